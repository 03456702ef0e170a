/**
 * A QEMU guest: Debian's kernel and virtio_net driver on an emulated CPU (TCG: needs neither KVM nor root), its memory
 * in memfds, its NIC's virtqueues in the back-end.
 *
 * File descriptor 3 of QEMU is the agent's serial port, 4 the machine protocol (QMP); the console is its output.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { AGENT_TERMINAL, buildInitramfs } from "./initramfs.ts";
import { qemuKernel } from "./kernel.ts";
import { LinuxGuest, macOf } from "./linux-guest.ts";
import type { GuestOptions } from "./linux-guest.ts";
import { Program } from "./program.ts";
import { qemuSystem } from "./tools.ts";

export interface QemuOptions extends GuestOptions {
  /** VIRTIO_F_RING_PACKED, if the back-end offers it. */
  readonly packed?: boolean;
  /** Neither leaves checksums and segments to the device nor takes them from it. */
  readonly noOffloads?: boolean;
  /** No VIRTIO_NET_F_MRG_RXBUF: a receive buffer holds the largest frame that may come. */
  readonly noMergeable?: boolean;
  /** Queue pairs, each with a CPU of its own. */
  readonly queuePairs?: number;
  /** A device before virtio 1.0. */
  readonly legacy?: boolean;
  /** QEMU listens on `socket`, and starts the guest when the back-end has come. Otherwise it dials, again every second. */
  readonly listen?: boolean;
  /** QEMU's arguments for memory and NIC, in place of those that it gets by the options above. */
  readonly arguments?: readonly string[];
  /** The command that runs it somewhere else, such as `inside` of a Network. */
  readonly wrap?: (command: readonly string[]) => readonly string[];
  /** How far plugMemory() may take the guest's memory. */
  readonly memoryMaxMiB?: number;
}

/** Prints the memory that the guest's kernel uses. */
const TOTAL_KIB = "awk '/MemTotal/ {print $2}' /proc/meminfo";

interface QmpReply {
  readonly return?: unknown;
  readonly error?: { readonly desc: string };
}

export class QemuGuest extends LinuxGuest {
  #replies: QmpReply[] = [];
  #dimms = 0;

  /** Resolves when eth0 is up and the guest takes commands. */
  static async boot(options: QemuOptions): Promise<QemuGuest> {
    const guest = await new QemuGuest(options).booted();
    await guest.#qmp("qmp_capabilities", {});
    return guest;
  }

  private constructor(options: QemuOptions) {
    const { wrap = (command) => command } = options;
    const program = new Program(`guest ${options.ip}`, wrap([qemuSystem, ...machine(options)]), { channels: 2 });
    super(options.ip, program, mkdtempSync(join(tmpdir(), "qemu-")));
    program.channel(4).on("error", () => {});
    createInterface({ input: program.channel(4) }).on("line", (line) => {
      const message = JSON.parse(line) as QmpReply;
      if ("return" in message || "error" in message) this.#replies.push(message);
    });
  }

  /** Whether the driver and the device have agreed on a feature. */
  async hasFeature(number: number): Promise<boolean> {
    return (await this.check("cat /sys/class/net/eth0/device/features"))[number] === "1";
  }

  /** Plugs a memory module in, and has the guest use it. */
  async plugMemory(sizeMiB: number): Promise<void> {
    const id = `plugged${this.#dimms++}`;
    const before = Number(await this.check(TOTAL_KIB));
    const memory = { "qom-type": "memory-backend-memfd", id, size: sizeMiB * 2 ** 20, share: true };
    await this.#qmp("object-add", memory);
    await this.#qmp("device_add", { driver: "pc-dimm", id: `${id}-dimm`, memdev: id });
    // the kernel hears of it by an interrupt, and brings it up in blocks
    await this.check(`
      until [ $(${TOTAL_KIB}) -ge ${before + sizeMiB * 1024} ]; do
        for state in $(grep -l offline /sys/devices/system/memory/memory*/state); do
          echo online_kernel >$state
        done
      done`);
  }

  async #qmp(command: string, parameters: object): Promise<unknown> {
    this.program.channel(4).write(`${JSON.stringify({ execute: command, arguments: parameters })}\n`);
    const reply = await this.program.until(`an answer to ${command}`, () => this.#replies.shift());
    if (reply.error) throw this.program.failure(`refuses ${command}: ${reply.error.desc}`);
    return reply.return;
  }
}

/** QEMU's arguments. */
function machine(options: QemuOptions): string[] {
  const { queuePairs = 1 } = options;
  const kernel = qemuKernel();
  const parameters = ["console=ttyS0", `${AGENT_TERMINAL}=ttyS1`, "panic=-1", "quiet", "mitigations=off", "nokaslr"];
  return [
    ..."-machine q35 -accel tcg,thread=multi -cpu max,la57=off -nodefaults -display none -no-reboot".split(" "),
    ..."-chardev stdio,id=console,signal=off -serial chardev:console".split(" "),
    ..."-chardev socket,id=agent,fd=3 -serial chardev:agent".split(" "),
    ..."-chardev socket,id=qmp,fd=4 -mon chardev=qmp,mode=control".split(" "),
    ...Object.entries({
      "-smp": String(queuePairs),
      "-kernel": kernel.image,
      "-initrd": buildInitramfs(kernel.modules),
      "-append": parameters.join(" "),
    }).flat(),
    ...(options.arguments ?? memoryAndNic(options)),
  ];
}

function memoryAndNic(options: QemuOptions): string[] {
  const { memoryMiB = 512, memoryMaxMiB, queuePairs = 1 } = options;
  return Object.entries({
    "-m": `${memoryMiB}M${memoryMaxMiB ? `,slots=4,maxmem=${memoryMaxMiB}M` : ""}`,
    "-object": `memory-backend-memfd,id=memory,size=${memoryMiB}M,share=on`,
    "-numa": "node,memdev=memory",
    "-chardev": `socket,id=nic,path=${options.socket},${options.listen ? "server=on" : "reconnect=1"}`,
    "-netdev": `vhost-user,id=nic,chardev=nic,queues=${queuePairs}`,
    "-device": nic(options),
  }).flat();
}

/** QEMU's names of the features of src/ports/offloads.ts. */
const OFFLOADS = ["csum", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "host_tso4", "host_tso6", "host_ecn"];

/** Properties without which virtio-net-pci does not work here. */
export function nicProperties(): string[] {
  // Before QEMU 8, and without KVM, it crashes when the guest masks an MSI-X vector of a vhost device.
  return qemuMajor() < 8 ? ["vectors=0"] : [];
}

function nic(options: QemuOptions): string {
  const { ip, packed = false, noOffloads = false, noMergeable = false, queuePairs = 1, legacy = false } = options;
  const properties = [
    "virtio-net-pci",
    "netdev=nic",
    `mac=${macOf(ip)}`,
    "romfile=",
    `packed=${packed ? "on" : "off"}`,
    ...(noOffloads ? OFFLOADS.map((offload) => `${offload}=off`) : []),
    ...(noMergeable ? ["mrg_rxbuf=off"] : []),
  ];
  if (queuePairs > 1) properties.push("mq=on", `vectors=${2 * queuePairs + 2}`);
  if (legacy) properties.push("disable-modern=on", "disable-legacy=off");
  return [...properties, ...nicProperties()].join(",");
}

function qemuMajor(): number {
  const { stdout } = spawnSync(qemuSystem, ["--version"], { encoding: "utf8" });
  return Number(/version (\d+)/.exec(stdout)?.[1]);
}
