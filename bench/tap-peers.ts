/**
 * A VM that sends as fast as it can, through several back-ends to a TAP interface each: how much arrives, and what
 * CPU time a frame costs the back-end.
 *
 * The VM is DPDK's testpmd (a net_virtio_user port, txonly), on a CPU of its own. Its frames are for somebody else,
 * so the host throws them away as soon as they have arrived. All back-ends are up all the time; they take turns.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { Program } from "../test/guests/program.ts";
import { Relay } from "../test/guests/relay.ts";
import { Testpmd } from "../test/guests/testpmd.ts";
import { median, printTable, ratio, spread } from "./figures.ts";
import { interfaceCounters } from "./tap-host.ts";

export interface PeersOptions {
  rounds: number;
  backEndCpu: number;
  guestCpu: number;
}

interface BackEnd {
  readonly name: string;
  /** What a VM connects to. */
  readonly socket: string;
  readonly process: Pick<Program, "signal" | "cpuTicks">;
  /** Frames of the VM that it has passed on so far. */
  frames(): number;
}

interface Contestant {
  readonly backEnd: BackEnd;
  readonly guest: Testpmd;
  readonly mpps: number[];
  readonly cpuNs: number[];
}

const FRAME_BYTES = [64, 1514];
const SETTLE_MS = 200;
const TURN_MS = 1000;
const TICK_NS = 10e6;

export async function comparePeers({ rounds, backEndCpu, guestCpu }: PeersOptions): Promise<void> {
  await using stack = new AsyncDisposableStack();
  const directory = mkdtempSync(join(tmpdir(), "vhost-relay-bench-"));
  stack.defer(() => rmSync(directory, { recursive: true }));

  console.log(
    `\npeers: a VM sends (DPDK virtio_user on CPU ${guestCpu}), the back-end on CPU ${backEndCpu} passes it to a TAP;`,
  );
  console.log(`median (min..max) of ${rounds} turns of ${TURN_MS / 1000} s`);
  const starts: ((socket: string) => Promise<BackEnd>)[] = [
    () => relay(stack, backEndCpu),
    (socket) => dpdk(stack, socket, backEndCpu),
  ];
  const contestants: Contestant[] = [];
  for (const [i, start] of starts.entries()) {
    const backEnd = await start(join(directory, `${i}.sock`));
    const args = ["--forward-mode=txonly"];
    const options = { sockets: [backEnd.socket], mergeable: true, cpus: String(guestCpu), args };
    const guest = stack.use(await Testpmd.start(options));
    backEnd.process.signal("SIGSTOP");
    contestants.push({ backEnd, guest, mpps: [], cpuNs: [] });
  }

  const rows = [["bytes", "back-end", "Mpps", "of relay's", "CPU used", "CPU ns a frame", "of relay's"]];
  for (const frameBytes of FRAME_BYTES) {
    for (const { guest } of contestants) await guest.command(`set txpkts ${frameBytes}`);
    for (let round = 0; round < rounds; round++) {
      for (let i = 0; i < contestants.length; i++) await takeTurn(contestants[(round + i) % contestants.length]!);
    }
    for (const { backEnd, mpps, cpuNs } of contestants) {
      const load = median(mpps.map((rate, round) => (rate * cpuNs[round]!) / 1e3));
      const cpu = `${Math.round(100 * load)}%`;
      const [ofMpps, ofNs] = [ratio(mpps, contestants[0]!.mpps), ratio(cpuNs, contestants[0]!.cpuNs)];
      const cells = [spread(mpps), ofMpps.toFixed(2), cpu, spread(cpuNs), ofNs.toFixed(2)];
      rows.push([String(frameBytes), backEnd.name, ...cells]);
    }
    for (const { mpps, cpuNs } of contestants) mpps.length = cpuNs.length = 0;
  }
  printTable(rows);
}

async function takeTurn({ backEnd, guest, mpps, cpuNs }: Contestant): Promise<void> {
  backEnd.process.signal("SIGCONT");
  await guest.command("start");
  await delay(SETTLE_MS);
  const sample = () => ({
    frames: backEnd.frames(),
    ticks: backEnd.process.cpuTicks,
    time: performance.now(),
  });
  const before = sample();
  await delay(TURN_MS);
  const after = sample();
  await guest.command("stop");
  backEnd.process.signal("SIGSTOP");
  const frames = after.frames - before.frames;
  mpps.push(frames / (after.time - before.time) / 1e3);
  cpuNs.push(((after.ticks - before.ticks) * TICK_NS) / frames);
}

async function relay(stack: AsyncDisposableStack, cpu: number): Promise<BackEnd> {
  const name = "bench-relay";
  const links = (socket: string) => [`vhost-user:${socket}=tap:${name}`];
  const process = stack.use(await Relay.start({ links, args: ["--cpus", String(cpu)] }));
  return { name: "relay", socket: process.sockets[0], process, frames: () => interfaceCounters(name).received };
}

/** DPDK's net_vhost and net_tap ports, one core that forwards between them. */
async function dpdk(stack: AsyncDisposableStack, socket: string, cpu: number): Promise<BackEnd> {
  const name = "bench-dpdk";
  const eal = `--lcores=0@${cpu},1@${cpu} --no-huge -m 256 --no-pci --no-shconf --no-telemetry`;
  const forwarding = "--forward-mode=io --auto-start --no-mlockall --total-num-mbufs=16384 --txd=1024 --rxd=1024";
  const process = stack.use(
    new Program("testpmd as a back-end", [
      ...`stdbuf -o0 dpdk-testpmd ${eal}`.split(" "),
      `--vdev=net_vhost0,iface=${socket},queues=1`,
      `--vdev=net_tap0,iface=${name}`,
      ...`-- --interactive ${forwarding}`.split(" "),
    ]),
  );
  await process.until("its prompt", () => process.stdout.includes("testpmd>") || undefined);
  return { name: "DPDK vhost - net_tap", socket, process, frames: () => interfaceCounters(name).received };
}
