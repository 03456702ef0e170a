/**
 * `vhost-relay run` as a child process: the program under test of the guest tests.
 *
 * RELAY_COMMAND, words separated by spaces, runs something else in its place, such as an installed `vhost-relay`.
 */
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readState } from "../../src/control/api.ts";
import type { LinkState } from "../../src/index.ts";
import { Program } from "./program.ts";
import type { Exit } from "./program.ts";

const main = join(import.meta.dirname, "../../src/cli/main.ts");
const command = process.env["RELAY_COMMAND"]?.split(" ") ?? [process.execPath, main];

export class Relay implements AsyncDisposable {
  /** The two ends of its one link: paths of vhost-user sockets. */
  readonly sockets: readonly [string, string];
  #directory: string;
  #command: readonly string[];
  #program: Program;

  /**
   * Resolves when the relay serves.
   * @param portOptions of both ports, such as `,queues=4`
   */
  static async start(portOptions = ""): Promise<Relay> {
    const relay = new Relay(portOptions);
    try {
      await relay.#serves();
      return relay;
    } catch (error) {
      await relay[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(portOptions: string) {
    this.#directory = mkdtempSync(join(tmpdir(), "relay-"));
    this.sockets = [join(this.#directory, "a.sock"), join(this.#directory, "b.sock")];
    const link = this.sockets.map((path) => `vhost-user:${path}${portOptions}`).join("=");
    this.#command = [...command, "run", "--link", link, "--control", this.#control];
    this.#program = new Program("vhost-relay", this.#command);
  }

  /** What it has written since it was started. */
  get log(): string {
    return this.#program.output;
  }

  /** What it says about its one link. */
  async link(): Promise<LinkState> {
    return (await readState(this.#control)).links[0]!;
  }

  /** SIGTERM; resolves when it has ended. */
  async stop(): Promise<Exit & { readonly elapsedMs: number }> {
    const start = performance.now();
    this.#program.signal("SIGTERM");
    const exit = await this.#program.exited;
    return { ...exit, elapsedMs: performance.now() - start };
  }

  /** SIGKILL: it can put nothing in order. */
  async kill(): Promise<void> {
    await this.#program.kill();
  }

  /** Starts another one in the place of one that was killed. */
  async restart(): Promise<void> {
    rmSync(this.#control);
    this.#program = new Program("vhost-relay", this.#command);
    await this.#serves();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program.kill();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  get #control(): string {
    return join(this.#directory, "control.sock");
  }

  /** The control socket comes last. */
  async #serves(): Promise<void> {
    await this.#program.until("its control socket", () => existsSync(this.#control) || undefined);
  }
}
