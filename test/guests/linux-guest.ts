/**
 * A Linux guest that takes commands, whatever it runs in.
 *
 * The kernel's messages are the program's output; commands go through the agent of initramfs.ts, on a terminal of its
 * own that the program has on file descriptor 3.
 */
import { rmSync } from "node:fs";
import { createInterface } from "node:readline";
import { AGENT_READY } from "./initramfs.ts";
import type { Program } from "./program.ts";

export interface GuestOptions {
  /** The back-end's vhost-user socket. */
  readonly socket: string;
  /** IPv4 address of eth0, in a /24 network. The MAC address is made from it, so it survives a restart. */
  readonly ip: string;
  readonly memoryMiB?: number;
}

export interface CommandResult {
  readonly status: number;
  /** Standard output and standard error. */
  readonly output: string;
}

export class LinuxGuest implements AsyncDisposable {
  readonly ip: string;
  protected readonly program: Program;
  readonly #directory: string;
  #ready = false;
  #commands = 0;
  #results = new Map<number, CommandResult>();

  /** @param directory the program's own; removed with the guest */
  protected constructor(ip: string, program: Program, directory: string) {
    this.ip = ip;
    this.program = program;
    this.#directory = directory;
    // An end by SIGKILL resets the channel; the program's exit is what tells.
    program.channel(3).on("error", () => {});
    createInterface({ input: program.channel(3) }).on("line", (line) => this.#receive(line));
  }

  /** Resolves to the guest when eth0 is up and the guest takes commands. */
  protected async booted(): Promise<this> {
    try {
      await this.program.until("its agent", () => this.#ready || undefined);
      await this.check(`ip link set eth0 address ${macOf(this.ip)} up && ip addr add ${this.ip}/24 dev eth0`);
      return this;
    } catch (error) {
      await this[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Runs a shell script in the guest; commands run one after the other. */
  async run(command: string): Promise<CommandResult> {
    const id = ++this.#commands;
    this.program.channel(3).write(`${id} ${Buffer.from(command).toString("base64")}\n`);
    const result = await this.program.until(`the end of: ${command}`, () => this.#results.get(id));
    this.#results.delete(id);
    return result;
  }

  /** Runs a shell script that has to succeed, and returns its output. */
  async check(command: string): Promise<string> {
    const { status, output } = await this.run(command);
    if (status !== 0) throw this.program.failure(`answered status ${status} to: ${command}\n${output}`);
    return output;
  }

  /** Loads a module that kernel.ts has the guests carry, unless it is there already. */
  async load(module: string): Promise<void> {
    // insmod fails for those that another one has brought
    await this.check(`
      if [ -e /modules/${module}.order ]; then
        for file in $(cat /modules/${module}.order); do insmod "/modules/$file" || true; done
        grep -q '^${module} ' /proc/modules
      fi`);
  }

  /** Ends the guest as a power failure would: SIGKILL for all its processes. */
  async kill(): Promise<void> {
    await this.program.kill();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** Ends the guest in order: its virtio device is reset and the front-end closes the connection. */
  async shutdown(): Promise<void> {
    this.program.channel(3).write(`0 ${Buffer.from("poweroff -f").toString("base64")}\n`);
    await this.program.exited;
    await this.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }

  #receive(line: string): void {
    if (line === AGENT_READY) {
      this.#ready = true;
      return;
    }
    const [id, status, output = ""] = line.split(" ");
    this.#results.set(Number(id), {
      status: Number(status),
      output: Buffer.from(output, "base64").toString(),
    });
  }
}

/** A locally administered address. */
export function macOf(ip: string): string {
  const octets = ip.split(".").map((octet) => Number(octet).toString(16).padStart(2, "0"));
  return ["02", "00", ...octets].join(":");
}
