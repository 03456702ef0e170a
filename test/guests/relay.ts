/**
 * `vhost-relay run` as a child process: the program under test of the guest tests.
 *
 * RELAY_COMMAND, words separated by spaces, runs something else in its place, such as an installed `vhost-relay`.
 */
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Program } from "./program.ts";
import type { Exit } from "./program.ts";

const main = join(import.meta.dirname, "../../src/cli/main.ts");
const command = process.env["RELAY_COMMAND"]?.split(" ") ?? [process.execPath, main];

export class Relay implements AsyncDisposable {
  /** The two ends of its one link: paths of vhost-user sockets it listens on. */
  readonly sockets: readonly [string, string];
  #directory: string;
  #program: Program;

  /** Resolves when both sockets exist. */
  static async start(...args: string[]): Promise<Relay> {
    const relay = new Relay(args);
    try {
      await relay.#program.until("its sockets", () => relay.sockets.every((path) => existsSync(path)) || undefined);
      return relay;
    } catch (error) {
      await relay[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(args: readonly string[]) {
    this.#directory = mkdtempSync(join(tmpdir(), "relay-"));
    this.sockets = [join(this.#directory, "a.sock"), join(this.#directory, "b.sock")];
    const link = this.sockets.map((path) => `vhost-user:${path}`).join("=");
    this.#program = new Program("vhost-relay", [...command, "run", "--link", link, ...args]);
  }

  /** What it has written so far. */
  get log(): string {
    return this.#program.output;
  }

  /** SIGTERM; resolves when it has ended. */
  async stop(): Promise<Exit & { readonly elapsedMs: number }> {
    const start = performance.now();
    this.#program.signal("SIGTERM");
    const exit = await this.#program.exited;
    return { ...exit, elapsedMs: performance.now() - start };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program.kill();
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
