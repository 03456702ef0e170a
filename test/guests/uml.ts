/**
 * A user-mode Linux guest: Debian's unmodified kernel and virtio_net driver as ordinary unprivileged processes,
 * attached to a vhost-user socket by virtio_uml (split ring, one queue pair, memory in one unlinked file).
 *
 * The kernel's messages are the program's output; commands go through an agent on a console of its own (initramfs.ts).
 */
import { mkdtempSync, rmSync, statfsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { AGENT_CONSOLE, AGENT_READY, buildInitramfs } from "./initramfs.ts";
import { Program } from "./program.ts";

/** Where the guest's memory file lies: vhost-user memory has to be on tmpfs. */
const memoryDirectory = "/dev/shm";

export interface GuestOptions {
  /** The back-end's vhost-user socket. */
  readonly socket: string;
  /** IPv4 address of eth0, in a /24 network. The MAC address is made from it, so it survives a restart. */
  readonly ip: string;
  readonly mtu?: number;
  readonly memoryMiB?: number;
}

export interface CommandResult {
  readonly status: number;
  /** Standard output and standard error. */
  readonly output: string;
}

export class UmlGuest implements AsyncDisposable {
  readonly ip: string;
  #program: Program;
  #directory: string;
  #ready = false;
  #commands = 0;
  #results = new Map<number, CommandResult>();

  /** Resolves when eth0 is up and the guest takes commands. */
  static async boot(options: GuestOptions): Promise<UmlGuest> {
    const guest = new UmlGuest(options);
    try {
      await guest.#program.until("its agent", () => guest.#ready || undefined);
      const mac = ["02", "00", ...options.ip.split(".").map((octet) => Number(octet).toString(16).padStart(2, "0"))];
      await guest.check(`ip link set eth0 address ${mac.join(":")} mtu ${options.mtu ?? 1500} up`);
      await guest.check(`ip addr add ${options.ip}/24 dev eth0`);
      return guest;
    } catch (error) {
      await guest[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor({ socket, ip, memoryMiB = 128 }: GuestOptions) {
    const { bavail, bsize } = statfsSync(memoryDirectory);
    if (bavail * bsize < memoryMiB * 2 ** 20) {
      throw new Error(`${memoryDirectory} has less than ${memoryMiB} MiB free for the guest's memory; enlarge it`);
    }
    this.ip = ip;
    this.#directory = mkdtempSync(join(tmpdir(), "uml-"));
    this.#program = new Program(
      `guest ${ip}`,
      [
        "linux.uml",
        `mem=${memoryMiB}M`,
        `initrd=${buildInitramfs()}`,
        `uml_dir=${this.#directory}/`,
        `virtio_uml.device=${socket}:1`,
        "con=null",
        "con0=null,fd:1",
        `${AGENT_CONSOLE}=fd:3`,
        "panic=-1",
      ],
      { env: { TMPDIR: memoryDirectory }, channel: true },
    );
    // An end by SIGKILL resets the channel; the program's exit is what tells.
    this.#program.channel.on("error", () => {});
    createInterface({ input: this.#program.channel }).on("line", (line) => this.#receive(line));
  }

  /** Runs a shell script in the guest; commands run one after the other. */
  async run(command: string): Promise<CommandResult> {
    const id = ++this.#commands;
    this.#program.channel.write(`${id} ${Buffer.from(command).toString("base64")}\n`);
    const result = await this.#program.until(`the end of: ${command}`, () => this.#results.get(id));
    this.#results.delete(id);
    return result;
  }

  /** Runs a shell script that has to succeed, and returns its output. */
  async check(command: string): Promise<string> {
    const { status, output } = await this.run(command);
    if (status !== 0) throw this.#program.failure(`answered status ${status} to: ${command}\n${output}`);
    return output;
  }

  /** Ends the guest as a power failure would: SIGKILL for all its processes. */
  async kill(): Promise<void> {
    await this.#program.kill();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** Ends the guest in order: its virtio device is reset and the front-end closes the connection. */
  async shutdown(): Promise<void> {
    this.#program.channel.write(`0 ${Buffer.from("poweroff -f").toString("base64")}\n`);
    await this.#program.exited;
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
