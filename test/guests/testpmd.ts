/**
 * DPDK's testpmd as the front-end of two vhost-user sockets (two net_virtio_user ports), driven through its prompt.
 *
 * It runs without huge pages: DPDK then keeps its memory in one memfd, which it shares with the back-end.
 */
import { availableParallelism } from "node:os";
import { describeExit, Program } from "./program.ts";

/** It has nothing behind it, or what happened to a port since. */
const prompt = /testpmd> (?:\n|$)/;

export interface TestpmdOptions {
  readonly sockets: readonly string[];
  /** VIRTIO_NET_F_MRG_RXBUF. */
  readonly mergeable: boolean;
  /** VIRTIO_F_RING_PACKED, for each port; default: neither. */
  readonly packed?: readonly [boolean, boolean];
  /** VIRTIO_F_IN_ORDER. */
  readonly inOrder?: boolean;
  readonly queuePairs?: number;
  /** The ports listen on their sockets, and wait for the back-end; it may go and come back. */
  readonly listen?: boolean;
  readonly queueSize?: number;
  /** Longest frame the ports take; longer ones than an mbuf (2048 bytes of data) are chains. */
  readonly maxFrameBytes?: number;
  /** CPUs it may run on, such as `1` or `0-3`; default: all. */
  readonly cpus?: string;
  /** More arguments of testpmd itself. */
  readonly args?: readonly string[];
}

/** The counters of a port, and what testpmd calls them. */
const counters = {
  rxPackets: "RX-packets",
  rxErrors: "RX-errors",
  rxNombuf: "RX-nombuf",
  txPackets: "TX-packets",
  txErrors: "TX-errors",
} as const;

export type Counter = keyof typeof counters;
export type PortStats = Record<Counter, number>;

export class Testpmd implements AsyncDisposable {
  readonly #program: Program;

  /** Resolves at the first prompt: the ports are up, nothing is forwarded yet. */
  static async start(options: TestpmdOptions): Promise<Testpmd> {
    const testpmd = new Testpmd(options);
    try {
      await testpmd.#answer(0);
      return testpmd;
    } catch (error) {
      await testpmd[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(options: TestpmdOptions) {
    const { sockets, queueSize = 1024, queuePairs = 1, maxFrameBytes = 1518, args = [] } = options;
    const { cpus = `0-${availableParallelism() - 1}` } = options;
    // without stdbuf, what it prints would lag behind its prompt
    const command = "stdbuf -o0 dpdk-testpmd";
    const eal = `--lcores=0@${cpus},1@${cpus} --no-huge -m 256 --no-pci --no-shconf --no-telemetry`;
    const log = "--log-level=pmd.net.virtio.init:debug";
    const forwarding = "--forward-mode=io --port-topology=paired --no-mlockall --total-num-mbufs=24576";
    this.#program = new Program("testpmd", [
      ...`${command} ${eal} ${log}`.split(" "),
      ...sockets.map((path, index) => `--vdev=net_virtio_user${index},path=${path},${deviceArguments(options, index)}`),
      ...`-- --interactive ${forwarding}`.split(" "),
      `--txd=${queueSize}`,
      `--rxd=${queueSize}`,
      `--txq=${queuePairs}`,
      `--rxq=${queuePairs}`,
      `--max-pkt-len=${maxFrameBytes}`,
      ...args,
    ]);
  }

  /** Features that port 0 and port 1 have agreed on with the back-end. */
  get features(): bigint[] {
    const found = this.#program.output.matchAll(/features after negotiate = (?:0x)?([\da-f]+)/g);
    return Array.from(found, ([, features]) => BigInt(`0x${features}`)).slice(-2);
  }

  /** Gives it a command; resolves to what it printed until its next prompt. */
  async command(text: string): Promise<string> {
    const start = this.#program.stdout.length;
    this.#program.input.write(`${text}\n`);
    return this.#answer(start);
  }

  /** Counters since the ports started, one entry a port. */
  async stats(): Promise<PortStats[]> {
    const answer = await this.command("show port stats all");
    const ports = answer.split("NIC statistics for port").slice(1);
    return ports.map((port) => {
      const read = (label: string): number => Number(new RegExp(`${label}: +(\\d+)`).exec(port)?.[1]);
      return Object.fromEntries(Object.entries(counters).map(([name, label]) => [name, read(label)])) as PortStats;
    });
  }

  /** Packets that each queue of a port has received since the ports started. */
  async queueStats(port: number): Promise<number[]> {
    const answer = await this.command(`show port xstats ${port}`);
    return Array.from(answer.matchAll(/^rx_q\d+_good_packets: (\d+)/gm), ([, packets]) => Number(packets));
  }

  /** Resolves to the first counters that `enough` accepts. */
  async statsWhen(what: string, enough: (stats: readonly PortStats[]) => boolean): Promise<PortStats[]> {
    let latest: PortStats[] = [];
    const deadline = Date.now() + 60_000;
    do {
      latest = await this.stats();
      if (enough(latest)) return latest;
    } while (Date.now() < deadline);
    throw this.#program.failure(`still has not seen ${what}: ${JSON.stringify(latest)}`);
  }

  /** Ends it in order: the ports are stopped and closed. */
  async quit(): Promise<void> {
    this.#program.input.write("quit\n");
    const exit = await this.#program.exited;
    if (exit.status !== 0) throw this.#program.failure(`ended with ${describeExit(exit)}`);
  }

  async kill(): Promise<void> {
    await this.#program.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }

  /** Waits for a prompt after `start`; its echo of the command is a prompt too, but has the command behind it. */
  async #answer(start: number): Promise<string> {
    return this.#program.until("its prompt", () => {
      const answer = this.#program.stdout.slice(start);
      return prompt.test(answer) ? answer : undefined;
    });
  }
}

/** What virtio_user is to offer and ask for on a port. */
function deviceArguments(options: TestpmdOptions, port: number): string {
  const { queueSize = 1024, queuePairs = 1, mergeable, packed, inOrder, listen } = options;
  const flag = (on: boolean | undefined): number => (on ? 1 : 0);
  const features = `mrg_rxbuf=${flag(mergeable)},packed_vq=${flag(packed?.[port])},in_order=${flag(inOrder)}`;
  return `queue_size=${queueSize},queues=${queuePairs},server=${flag(listen)},${features}`;
}
