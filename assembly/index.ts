/**
 * The core: one lane. It carries frames from one guest's transmitq to another's receiveq.
 *
 * Theory of operation. The host instantiates the core with a memory 0 of its own (src/layout/lane.ts) and the segments of
 * its two guests, writes rings and extents into memory 0, and calls poll() for ever. The core never blocks, never
 * allocates and imports nothing but guest accessors; whatever a guest writes, the outcome is a counter, a chain returned
 * with length 0, or a broken ring. Each ring index, head, descriptor and header byte is loaded from guest memory once
 * into a local, checked there and used from there. Every loop over guest data is bounded by the ring size.
 */
import { awaitBuffers, finishReceive, prepareReceive } from "./file/receive";
import { awaitFrames, finishSend, prepareSend } from "./file/send";
import { Destination, Source } from "./guest";
import { awaitKicks, carryFrames, ignoreKicks } from "./lane/copy";
import { carryInjected } from "./lane/frame";
import { forgetExtents } from "./translate";
import { isFile } from "./vring";

/**
 * Carries at most `budget` frames.
 * @param stuck nonzero: waited too long for receive buffers, drop frames that find none
 * @returns POLL_* of src/layout/lane.ts
 */
export function poll(budget: u32, stuck: u32): u32 {
  return carryFrames(budget, stuck != 0);
}

/**
 * Of a lane with a file at one end, in place of poll: makes requests to the kernel for at most `budget` frames, which are to be
 * handed over before finish() is called, in any case.
 * @returns how many requests
 */
export function prepare(budget: u32): u32 {
  return isFile<Destination>() ? prepareSend(budget) : prepareReceive(budget);
}

/** Takes what came of the requests. @returns as poll */
export function finish(): u32 {
  return isFile<Destination>() ? finishSend() : finishReceive();
}

/** Before blocking: asks the drivers for kicks. @param stuck as for poll @returns nonzero if there is work after all */
export function arm(stuck: u32): u32 {
  if (isFile<Destination>()) return awaitFrames() ? 1 : 0;
  if (isFile<Source>()) return awaitBuffers() ? 1 : 0;
  return awaitKicks(stuck != 0) ? 1 : 0;
}

/** After blocking: the rings are polled again. */
export function disarm(): void {
  ignoreKicks();
}

/**
 * Delivers the frame at INJECT_FRAME of memory 0 before any other, or not at all if there is no room.
 * @returns as poll: 1 frame or none, and what is due
 */
export function inject(length: u32): u32 {
  return carryInjected(length);
}

/** The control plane has changed rings or extents in memory 0. */
export function refresh(): void {
  forgetExtents();
}
