/**
 * `vhost-relay run` as a child process: the program under test of the guest tests.
 *
 * RELAY_COMMAND, words separated by spaces, runs something else in its place, such as an installed `vhost-relay`.
 */
import { chownSync, existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readState } from "../../src/control/api.ts";
import type { LinkState } from "../../src/index.ts";
import { Program } from "./program.ts";
import type { Exit } from "./program.ts";

const main = join(import.meta.dirname, "../../src/cli/main.ts");
const command = process.env["RELAY_COMMAND"]?.split(" ") ?? [process.execPath, main];

/** A relay that is not just two vhost-user ports joined. */
export interface RelayOptions {
  /** Its links, given the paths of two sockets that are its own. */
  readonly links: (...sockets: [string, string]) => readonly string[];
  /** More of its arguments. */
  readonly args?: readonly string[];
  /** The command that runs it somewhere else, such as `inside` of a Network. */
  readonly wrap?: (command: readonly string[]) => readonly string[];
  /** Numeric id of the user that owns the directory of its sockets; default: ours. */
  readonly owner?: number;
}

export class Relay implements AsyncDisposable {
  /** Paths of vhost-user sockets: the two ends of its one link, if it was not told otherwise. */
  readonly sockets: readonly [string, string];
  #directory: string;
  #command: readonly string[];
  #program: Program;

  /**
   * Resolves when the relay serves.
   * @param options of both ports, such as `,queues=4`, or all there is to say
   */
  static async start(options: string | RelayOptions = ""): Promise<Relay> {
    const relay = new Relay(
      typeof options === "string"
        ? { links: (...sockets) => [sockets.map((path) => `vhost-user:${path}${options}`).join("=")] }
        : options,
    );
    try {
      await relay.#serves();
      return relay;
    } catch (error) {
      await relay[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** One whose link joins a VM to a TAP interface. @param port such as `tap:vm0` @param options of the VM's port */
  static async toTap(
    port: string,
    network: { inside: (command: readonly string[]) => readonly string[] },
    options = "",
  ): Promise<Relay> {
    return Relay.start({ links: (path) => [`vhost-user:${path}${options}=${port}`], wrap: network.inside });
  }

  private constructor({ links, args = [], wrap = (command) => command, owner }: RelayOptions) {
    this.#directory = mkdtempSync(join(tmpdir(), "relay-"));
    if (owner !== undefined) chownSync(this.#directory, owner, owner);
    this.sockets = [join(this.#directory, "a.sock"), join(this.#directory, "b.sock")];
    const linkArgs = links(...this.sockets).flatMap((link) => ["--link", link]);
    this.#command = wrap([...command, "run", ...linkArgs, "--control", this.#control, ...args]);
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

  /** CPU time that its threads have taken so far, in ticks: 100 a second. */
  get cpuTicks(): number {
    return this.#program.cpuTicks;
  }

  /** Such as SIGSTOP and SIGCONT. */
  signal(signal: NodeJS.Signals): void {
    this.#program.signal(signal);
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
