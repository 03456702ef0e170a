/**
 * Ring to ring: frames from the source's transmitq are copied once, into the destination's receiveq.
 *
 * A frame for which there are too few receive buffers stays in the source ring, which is its queue: the lane waits (the
 * poller decides how long).
 *
 * Usual frames, one descriptor into one, are carried in runs (run.ts). Whatever else is legal goes through lists of
 * pieces, one frame at a time (frame.ts).
 */
import {
  COUNT_CALLS_SOURCE,
  COUNT_DROP_NO_BUFFER,
  POLL_BROKE_SOURCE,
  POLL_CALL_SOURCE,
  POLL_PROGRESS,
  POLL_WAITING,
  SOURCE_VRING,
  VRING_ENABLED,
  VRING_FLAGS,
  VRING_SEGMENTS_SENT,
} from "../../src/layout/lane.ts";
import { WALK_MAX, walked } from "../chain";
import { Destination, Source } from "../guest";
import { requestKick, suppressKicks } from "../notify";
import { behind, countOffered, fits, give, isOffered, isRunning, publish } from "../ring";
import { count, countDelivered } from "../stats";
import { breakRing, nextAvail, setNextAvail } from "../vring";
import { isWaiting, stopWaiting, waitingAt } from "./buffers";
import { carryRun, runBytes, runEnd, skipRun } from "./run";
import { decideCall } from "./calls";
import {
  DELIVERED,
  DROPPED,
  NO_BUFFERS,
  NO_CHAIN,
  BROKEN,
  UNFINISHED,
  receiving,
  frameBytes,
  frameId,
  frameSlots,
  madeSegments,
  beginFrames,
  carryFrame,
  isReceiving,
  finishDestination,
} from "./frame";

/**
 * Carries up to `budget` frames.
 * @param dropWhenStuck the wait for buffers was too long: drop frames until there are some
 * @returns POLL_*: transmit chains taken, and what is due
 */
export function carryFrames(budget: u32, dropWhenStuck: bool): u32 {
  if (!isRunning<Source>()) return 0;
  beginFrames();
  if (isWaiting() && !dropWhenStuck && receiving && !isOffered<Destination>(waitingAt())) return POLL_WAITING;

  let position = nextAvail<Source>();
  const offered = countOffered<Source>(budget);
  if (offered == 0) return isWaiting() ? POLL_WAITING : 0;
  if (offered < 0) {
    breakRing<Source>();
    return POLL_BROKE_SOURCE;
  }
  const limit = <u32>offered;

  let result: u32 = 0;
  const walkedBefore = walked;
  let taken: u32 = 0;
  let delivered: u64 = 0;
  let bytes: u64 = 0;
  const enabled = (load<u32>(SOURCE_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
  // Where no frame is a usual one, beginning a run each time is lost time: 1, 3, 7, ... frames go without.
  let patience: u32 = 0;
  let without: u32 = enabled && receiving ? 0 : u32.MAX_VALUE;
  for (; taken < limit && walked - walkedBefore <= WALK_MAX; ++taken) {
    if (without == 0 && receiving) {
      const run = carryRun(position, limit - taken);
      patience = run ? 0 : 2 * patience + 1;
      without = run ? 0 : patience;
      delivered += run;
      bytes += runBytes;
      taken += run;
      position = runEnd;
      if (taken == limit) break;
    } else {
      --without;
      skipRun();
    }
    let outcome = carryFrame(position, enabled);
    if (outcome == NO_CHAIN || outcome == UNFINISHED) break;
    if (outcome == BROKEN) {
      breakRing<Source>();
      result |= POLL_BROKE_SOURCE;
      break;
    }
    if (outcome == DROPPED && !dropWhenStuck) stopWaiting(); // whatever it waited for
    if (outcome == NO_BUFFERS) {
      if (!dropWhenStuck || delivered || madeSegments) break;
      count(COUNT_DROP_NO_BUFFER);
      outcome = DROPPED;
    }
    if (outcome == DELIVERED) {
      ++delivered;
      bytes += frameBytes;
    }
    store<u32>(SOURCE_VRING, 0, VRING_SEGMENTS_SENT);
    if (!fits<Source>(1, frameSlots)) publish<Source>();
    give<Source>(frameId, 0, frameSlots);
    position = behind<Source>(position, frameSlots);
  }

  setNextAvail<Source>(position);
  publish<Source>();
  countDelivered(delivered, bytes);
  // Where buffers came back the wait begins anew: this poll does not count towards it.
  if (isWaiting() && !(dropWhenStuck && (delivered || madeSegments))) result |= POLL_WAITING;
  if (madeSegments) result |= POLL_PROGRESS;
  return result | taken | finishDestination() | decideCall<Source>(COUNT_CALLS_SOURCE, POLL_CALL_SOURCE);
}

/**
 * Asks for kicks on what the lane waits for: receive buffers, or frames.
 * @param dropWhenStuck as for carryFrames
 * @returns whether there is work after all
 */
export function awaitKicks(dropWhenStuck: bool): bool {
  if (!isRunning<Source>()) return false;
  if (isWaiting() && !dropWhenStuck && isReceiving()) {
    requestKick<Destination>(waitingAt());
    return isOffered<Destination>(waitingAt());
  }
  requestKick<Source>(nextAvail<Source>());
  return isOffered<Source>(nextAvail<Source>());
}

/** Polling again: kicks are pointless. */
export function ignoreKicks(): void {
  if (isRunning<Source>()) suppressKicks<Source>();
  if (isRunning<Destination>()) suppressKicks<Destination>();
}
