/** The canary's thread: two drivers that exchange numbered frames at a steady rate and check each. */
import { workerData } from "node:worker_threads";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import { CANARY_ERRORS, CANARY_MODE, CANARY_READY, CANARY_RECEIVED, CANARY_SENT, CANARY_WORST_US } from "./canary.ts";
import { MODE_END, MODE_RUN } from "./canary.ts";

/** Frames each way every millisecond: 10 000 a second together. */
const BURST = 5;
const HEADER = 14;
const [SEQUENCE, TIME, PATTERN] = [HEADER, HEADER + 4, HEADER + 12];

const { paths, control } = workerData as { paths: string[]; control: Int32Array };
const pattern = Uint8Array.from({ length: 4096 }, (_, i) => (i * i * 5 + (i >> 4)) & 0xff);

function frame(sequence: number): Uint8Array {
  const bytes = pattern.slice(sequence % 251, (sequence % 251) + 60 + ((sequence * 37) % 1400));
  const view = new DataView(bytes.buffer);
  view.setUint32(SEQUENCE, sequence);
  view.setFloat64(TIME, performance.now());
  return bytes;
}

/** One direction: what was sent and what came. */
const flows = [
  { sent: 0, next: 0 },
  { sent: 0, next: 0 },
];

function take(flow: { next: number }, bytes: Uint8Array): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const sequence = view.getUint32(SEQUENCE);
  const expected = pattern.subarray((sequence % 251) + PATTERN, (sequence % 251) + 60 + ((sequence * 37) % 1400));
  if (sequence !== flow.next || Buffer.compare(bytes.subarray(PATTERN), expected) !== 0)
    Atomics.add(control, CANARY_ERRORS, 1);
  flow.next = sequence + 1;
  const microseconds = Math.round((performance.now() - view.getFloat64(TIME)) * 1000);
  if (microseconds > Atomics.load(control, CANARY_WORST_US)) Atomics.store(control, CANARY_WORST_US, microseconds);
  Atomics.add(control, CANARY_RECEIVED, 1);
}

using open = new DisposableStack();
const guests = paths.map(() => open.use(new Guest([{ gpa: 0n, sizeBytes: 8n << 20n }])));
const drivers: NetDriver[] = [];
for (const [i, guest] of guests.entries()) {
  drivers.push(open.use(await NetDriver.connect({ path: paths[i]!, guest, frameBytesMax: 2048 })));
}
Atomics.store(control, CANARY_READY, 1);
for (let mode: number; (mode = Atomics.load(control, CANARY_MODE)) !== MODE_END;) {
  for (const [from, flow] of flows.entries()) {
    const pair = drivers[from]!.pairs[0]!;
    pair.flush();
    for (let i = 0; mode === MODE_RUN && i < BURST && pair.transmit(frame(flow.sent)); i++) {
      flow.sent++;
      Atomics.add(control, CANARY_SENT, 1);
    }
    pair.flush();
    while (drivers[1 - from]!.pairs[0]!.receive(64, (bytes) => take(flow, bytes)) > 0);
  }
  Atomics.wait(control, CANARY_MODE, mode, 1);
}
