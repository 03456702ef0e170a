/**
 * Worker thread of the demo: one virtio-net driver that sends its own stream and checks the other's.
 *
 * The thread owns its loop and sleeps on eventfds when there is nothing to do. The main thread steers it by
 * `control` and reads `counters`; a frame that is not the expected one, byte for byte and in order, ends the thread
 * with an error.
 */
import { parentPort, workerData } from "node:worker_threads";
import { Guest } from "../driver/guest.ts";
import { NetDriver } from "../driver/net.ts";
import { COUNTER, PHASE } from "./protocol.ts";
import type { DriverTask } from "./protocol.ts";
import { FRAME_SIZE_MAX, Traffic } from "./traffic.ts";

const BATCH = 64;
const GUEST_BYTES = 64n << 20n;
/** Above 4 GiB, where most memory of real guests lies. */
const GUEST_GPA = 1n << 32n;
/** A wake-up that got lost costs at most this. */
const WAIT_MS = 1000;

const { path, wakeFd, frames, send, expect, control, counters } = workerData as DriverTask;

using guest = new Guest([{ gpa: GUEST_GPA, sizeBytes: GUEST_BYTES }]);
const longest = frames.reduce((max, frame) => Math.max(max, frame.length), FRAME_SIZE_MAX);
using driver = await NetDriver.connect({
  path,
  guest,
  ringSize: 512,
  receiveBufferBytes: 4096,
  frameBytesMax: longest,
});
driver.wakeOn(wakeFd);
parentPort?.postMessage("ready");
run();

function run(): void {
  const [pair] = driver.pairs;
  if (pair === undefined) return;
  const outgoing = new Traffic(frames, send);
  const incoming = new Traffic(frames, expect);
  let sent = 0;
  let received = 0;
  let receivedBytes = 0;
  const check = (frame: Uint8Array): void => {
    const difference = incoming.difference(received, frame);
    if (difference !== undefined) throw new Error(difference);
    received++;
    receivedBytes += frame.length;
  };
  for (;;) {
    const phase = Atomics.load(control, 0);
    if (phase === PHASE.quit) return;
    const taken = pair.receive(BATCH, check);
    const before = sent;
    if (phase === PHASE.transmit) {
      while (sent - before < BATCH && pair.transmit(outgoing.frame(sent))) sent++;
      pair.flush();
    }
    Atomics.store(counters, COUNTER.sent, BigInt(sent));
    Atomics.store(counters, COUNTER.received, BigInt(received));
    Atomics.store(counters, COUNTER.receivedBytes, BigInt(receivedBytes));
    Atomics.store(counters, COUNTER.phase, BigInt(phase));
    if (taken === 0 && sent === before) driver.wait(WAIT_MS, phase === PHASE.transmit);
  }
}
