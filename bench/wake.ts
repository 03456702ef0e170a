/**
 * `npm run bench:wake`: microseconds from a kick to the frame's arrival, through a real relay on loopback.
 *
 * The driver sends one frame, spins until it comes back, pauses, and so on. After a pause longer than the poller's grace it
 * is asleep: the figure then holds the eventfd write, the kernel's wake-up of the poller, and the carrying of one
 * frame. Modes take turns; the driver is pinned to one CPU, the poller to the other.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { pinThread } from "../native/sched.ts";
import { Guest } from "../src/driver/guest.ts";
import { NetDriver } from "../src/driver/net.ts";
import { Relay } from "../src/index.ts";

const FRAMES = 500;
const PAUSE_MS = 2;
const MODES = ["adaptive", "interrupt", "busy"] as const;

const directory = mkdtempSync(join(tmpdir(), "vhost-relay-bench-"));
pinThread(1);
try {
  console.log("mode       p50 us  p90 us  p99 us   sleeps");
  for (const poll of MODES) {
    const path = join(directory, `${poll}.sock`);
    await using relay = await Relay.start({ links: [[`vhost-user:${path}`, "loopback"]], poll, cpus: [0] });
    using guest = new Guest([{ gpa: 0n, sizeBytes: 16n << 20n }]);
    using driver = await NetDriver.connect({ path, guest });
    const microseconds = await roundTrips(driver);
    const at = (share: number) => microseconds[Math.floor(share * microseconds.length)]!.toFixed(1).padStart(6);
    const sleeps = relay.state.pollers[0]!.sleeps;
    console.log(`${poll.padEnd(9)}  ${at(0.5)}  ${at(0.9)}  ${at(0.99)}  ${String(sleeps).padStart(7)}`);
  }
} finally {
  rmSync(directory, { recursive: true });
}

/** Sorted times of FRAMES frames there and back, in microseconds. */
async function roundTrips(driver: NetDriver): Promise<number[]> {
  const [pair] = driver.pairs;
  if (!pair) throw new Error("no queue pair");
  const frame = new Uint8Array(64).fill(1);
  const microseconds: number[] = [];
  for (let i = 0; i < FRAMES; i++) {
    await sleep(PAUSE_MS);
    const start = performance.now();
    pair.transmit(frame);
    pair.flush();
    while (pair.receive(1, () => undefined) === 0);
    microseconds.push((performance.now() - start) * 1000);
    pair.flush();
  }
  return microseconds.toSorted((a, b) => a - b);
}
