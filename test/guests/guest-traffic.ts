/** What Linux guests do to each other: pings that are counted, and files whose bytes are checked. */
import { setTimeout as delay } from "node:timers/promises";
import { expect } from "vitest";
import type { CommandResult, LinuxGuest } from "./linux-guest.ts";

const data = "/srv/data";
const sum = "/srv/sum";

/** A guest, or a network of the host's: what has an address and runs shell scripts with busybox's programs. */
export interface Machine {
  readonly ip: string;
  run(command: string): Promise<CommandResult>;
  /** A script that has to succeed; returns its output. */
  check(command: string): Promise<string>;
}

/** Fifty pings, one as soon as the last is answered. */
export async function expectEveryPing(from: Machine, to: Pick<Machine, "ip">, payloadBytes: number): Promise<void> {
  const output = await from.check(`ping -q -A -c 50 -s ${payloadBytes} ${to.ip}`);
  expect(output).toContain("50 packets transmitted, 50 packets received, 0% packet loss");
}

/** Has a machine serve a file of random bytes to downloads. */
export async function serveFile(guest: Machine, sizeMiB: number): Promise<void> {
  await guest.check(`
    mkdir -p /srv
    head -c ${sizeMiB}m /dev/urandom >${data}
    sha256sum <${data} >${data}.sum
    httpd -h /srv`);
}

/** A download over TCP, whose bytes are compared by their SHA-256. */
export class Download {
  readonly #from: Machine;
  readonly #to: Machine;

  static async start(from: Machine, to: Machine): Promise<Download> {
    await to.check(`
      mkdir -p /srv
      rm -f ${sum}
      (wget -q -O - http://${from.ip}/${data.split("/").at(-1)} | sha256sum >${sum}.unfinished
        mv ${sum}.unfinished ${sum}) >/dev/null 2>&1 &`);
    return new Download(from, to);
  }

  private constructor(from: Machine, to: Machine) {
    this.#from = from;
    this.#to = to;
  }

  async hasEnded(): Promise<boolean> {
    return (await this.#to.run(`test -e ${sum}`)).status === 0;
  }

  /** Resolves when another so many bytes have arrived. */
  async progress(bytes: number): Promise<void> {
    const received = "cat /sys/class/net/eth0/statistics/rx_bytes";
    await this.#to.check(
      `end=$(( $(${received}) + ${bytes} )); until [ $(${received}) -ge $end ]; do usleep 10000; done`,
    );
  }

  /** Resolves when every byte has arrived as it was sent. */
  async complete(): Promise<void> {
    while (!(await this.hasEnded())) await delay(100);
    expect(await this.#to.check(`cat ${sum}`)).toBe(await this.#from.check(`cat ${data}.sum`));
  }
}

/** Downloads the file that a guest serves. */
export async function expectDownload(from: Machine, to: Machine): Promise<void> {
  await (await Download.start(from, to)).complete();
}

/** Five pings a second, as long as it runs. */
export class LongPing {
  readonly #from: LinuxGuest;

  static async start(from: LinuxGuest, to: Pick<Machine, "ip">): Promise<LongPing> {
    await from.check(`ping -i 0.2 ${to.ip} >/tmp/ping 2>&1 &`);
    return new LongPing(from);
  }

  private constructor(from: LinuxGuest) {
    this.#from = from;
  }

  /** Ends it; returns the lengths of the gaps: how many pings in a row were lost, each time some were. */
  async stop(): Promise<number[]> {
    const output = await this.#from.check("killall -INT ping; sleep 1; cat /tmp/ping");
    const answered = Array.from(output.matchAll(/ seq=(\d+) /g), ([, seq]) => Number(seq));
    expect(answered.length).toBeGreaterThan(0);
    return answered.map((seq, i) => seq - (answered[i - 1] ?? -1) - 1).filter((lost) => lost > 0);
  }
}

/** A guest with a CPU for each of its four queue pairs sends on the one that belongs to the CPU. */
export async function pingFromEveryCpu(from: LinuxGuest, to: Pick<Machine, "ip">): Promise<void> {
  for (const mask of [1, 2, 4, 8]) {
    const output = await from.check(`taskset ${mask} ping -q -A -c 20 ${to.ip}`);
    expect(output).toContain("20 packets transmitted, 20 packets received");
  }
}

/** A guest's kernel has seen nothing wrong with its virtqueues. */
export async function expectNoComplaints(guest: LinuxGuest): Promise<void> {
  const bad = "not a head|out of range|virtio.*(bad|broken|error)|NETDEV WATCHDOG|csum|BUG|WARNING|Oops|stall";
  expect((await guest.run(`dmesg | grep -E '${bad}'`)).output).toBe("");
}

/** The parts of iperf3's JSON report that tell whether traffic arrived. */
interface IperfReport {
  readonly error?: string;
  readonly end: {
    readonly sum_received?: { readonly bytes: number; readonly seconds: number };
    readonly sum?: { readonly packets: number; readonly lost_packets: number };
  };
}

/** How long each run of iperf3 is to take. */
export const iperfSeconds = Number(process.env["GUEST_TRAFFIC_SECONDS"] ?? (process.env["CI"] === "true" ? 10 : 2));

/** A run of iperf3 against the server on another machine. @param options of iperf3; `--reverse` makes the server send */
export async function iperf(
  client: Machine,
  server: Pick<Machine, "ip">,
  ...options: string[]
): Promise<IperfReport["end"]> {
  const command = ["iperf3 --json --client", server.ip, "--time", iperfSeconds, ...options].join(" ");
  const report = JSON.parse((await client.run(command)).output) as IperfReport;
  expect(report.error).toBeUndefined();
  return report.end;
}

/** TCP at more than a crawl: a stalled link passes a window or two and no more. @returns Mbit/s */
export async function expectTcp(client: Machine, server: Pick<Machine, "ip">, ...options: string[]): Promise<number> {
  const { bytes, seconds } = (await iperf(client, server, ...options)).sum_received!;
  expect(bytes).toBeGreaterThan(iperfSeconds * 1e6);
  return Math.round((bytes * 8e-6) / seconds);
}

/** UDP at a modest rate. */
export async function expectUdp(client: Machine, server: Pick<Machine, "ip">, ...options: string[]): Promise<void> {
  const { packets, lost_packets: lost } = (await iperf(client, server, "--udp", "--bitrate 20M", ...options)).sum!;
  expect(packets).toBeGreaterThan(100);
  // a guest may lose some in its socket's buffer when the machine is busy; a broken link loses all
  expect(packets - lost).toBeGreaterThan(packets / 2);
}
