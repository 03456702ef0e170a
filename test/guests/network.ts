/**
 * A network of the test's own: a namespace (network_namespaces(7)) with the host's end of TAP interfaces, bridges and
 * whatever else a test puts there. It ends with the process that holds it, so nothing is left behind, whatever happens.
 *
 * It has a mount namespace of its own too: /sys shows its interfaces, /run and /srv are empty.
 */
import { existsSync, mkdtempSync, readdirSync, readlinkSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Machine } from "./guest-traffic.ts";
import type { CommandResult } from "./linux-guest.ts";
import { describeExit, Program } from "./program.ts";
import { findTool, missingTools } from "./tools.ts";
import type { Tool } from "./tools.ts";

/** Programs by which a network does what a guest does, the same way. */
const APPLETS = ["httpd", "ping", "usleep", "wget"];

/** Why no network can be made here, or undefined. @throws Error under CI */
export function missingForNetworks(...tools: Tool[]): string | undefined {
  const missing = missingTools("busybox", "ip", ...tools);
  if (missing !== undefined) return missing;
  const reason =
    process.getuid?.() !== 0 ? "needs root" : existsSync("/dev/net/tun") ? undefined : "needs /dev/net/tun";
  if (reason !== undefined && process.env["CI"] === "true") throw new Error(reason);
  return reason;
}

export class Network implements Machine, AsyncDisposable {
  /** The address that the others know it by. */
  readonly ip: string;
  readonly #holder: Program;
  readonly #bin: string;
  /** Identity of its namespace, once it is there. */
  #namespace: string | undefined;

  /** Resolves when it is there; its only interface is the loopback. @param ip see `ip`; it is up to the test to give it to an interface */
  static async make(ip = "10.0.0.254"): Promise<Network> {
    const network = new Network(ip);
    try {
      await network.#holder.until("its namespace", () => network.#holder.stdout.includes("ready") || undefined);
      network.#namespace = namespaceOf(network.pid);
      // all that is in it will be killed
      if (network.#namespace === namespaceOf("self")) {
        network.#namespace = undefined;
        throw new Error("unshare --net made no namespace");
      }
      return network;
    } catch (error) {
      await network[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(ip: string) {
    this.ip = ip;
    this.#bin = mkdtempSync(join(tmpdir(), "network-"));
    for (const applet of APPLETS) symlinkSync(findTool("busybox")!, join(this.#bin, applet));
    const mounts = "mount -t sysfs network /sys; mount -t tmpfs network /run; mount -t tmpfs network /srv";
    const script = `${mounts}; ip link set lo up; echo ready; exec cat`;
    this.#holder = new Program(`network ${ip}`, ["unshare", "--net", "--mount", "--", "sh", "-ec", script]);
  }

  /** What `ip link set ... netns` takes. */
  get pid(): number {
    return this.#holder.pid;
  }

  /** A command that runs this one in the network, as the same process. */
  readonly inside = (command: readonly string[]): string[] => {
    const namespaces = ["net", "mnt"].map((name, i) => `--${["net", "mount"][i]!}=/proc/${this.pid}/ns/${name}`);
    return ["nsenter", ...namespaces, `--wd=${process.cwd()}`, "--", ...command];
  };

  /** Starts a program that stays; it ends with the network, if not before. */
  start(name: string, command: readonly string[]): Program {
    return new Program(name, this.inside(command), { env: { PATH: this.#path } });
  }

  async run(command: string): Promise<CommandResult> {
    const program = this.start("a command in the network", ["sh", "-ec", command]);
    const { status } = await program.exited;
    return { status: status ?? -1, output: program.output };
  }

  check(command: string): Promise<string> {
    return this.execute(["sh", "-ec", command]);
  }

  /** Runs a program that has to succeed; returns its output. */
  async execute(command: readonly string[]): Promise<string> {
    const program = this.start("a command in the network", command);
    const exit = await program.exited;
    if (exit.status !== 0) throw program.failure(`(${command.join(" ")}) ended with ${describeExit(exit)}`);
    return program.output;
  }

  /** A counter of an interface, by its name in /sys. */
  async count(name: string, counter: string): Promise<number> {
    return Number(await this.check(`cat /sys/class/net/${name}/statistics/${counter}`));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // daemons among them: an interface lives as long as anybody is in its namespace
    while (this.#namespace !== undefined) {
      const left = readdirSync("/proc").filter(
        (entry) => /^\d+$/.test(entry) && namespaceOf(entry) === this.#namespace,
      );
      if (left.length === 0) break;
      for (const pid of left) kill(Number(pid));
      await delay(5);
    }
    await this.#holder.kill();
    rmSync(this.#bin, { recursive: true, force: true });
  }

  get #path(): string {
    return `${this.#bin}:${process.env["PATH"]}`;
  }
}

/** Identity of the network namespace a process is in; undefined once it has ended. */
function namespaceOf(pid: string | number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/net`);
  } catch {
    return undefined;
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}
