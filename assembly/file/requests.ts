/**
 * Requests to the kernel (src/layout/requests.ts): the core writes them, the poller hands over all at once, and when that system
 * call is over the core reads what came of them.
 *
 * All accesses are plain: the kernel takes requests and writes completions within a system call of this same thread.
 *
 * A request is made of iovecs: process addresses of guest buffers, or of memory 0. They come from extents and from
 * MEMORY_BASES, never from the guest as they are; each is inside the guest's memory, for the kernel does not ask.
 */
import {
  BOUNCES,
  BOUNCE_BYTES,
  CARRIED,
  CARRIED_BYTES,
  FORMAT_ADDRESS,
  FORMAT_DONE,
  FORMAT_DONE_HEAD,
  FORMAT_DONE_MASK,
  FORMAT_DONE_RESULT,
  FORMAT_DONE_SHIFT,
  FORMAT_DONE_TAIL,
  FORMAT_LENGTH,
  FORMAT_OPERATION,
  FORMAT_TAIL,
  FORMAT_VECTOR,
  FORMAT_WHOLE,
  IOVECS,
  IOVECS_MAX,
  IOVEC_BYTES,
  MEMORY_BASES,
  REQUESTS,
  REQUESTS_MAX,
  REQUEST_BYTES,
  REQUEST_FORMAT,
} from "../../src/layout/requests.ts";
import { end, load64, load8 } from "../guest";
import { SEGMENTS_MAX, SEGMENT_PAGES } from "../../src/layout/lane.ts";

// The record of a request: CARRIED + number * CARRIED_BYTES
/** i32: bytes, or an errno, negative. */
export const CARRIED_RESULT: usize = 0;
/** What to give back: u32 id, u32 slots of the ring; and the position behind the chain. */
export const CARRIED_ID: usize = 4;
export const CARRIED_SLOTS: usize = 8;
export const CARRIED_BEHIND: usize = 12;
/** u32: bytes that the guest's buffers have room for, or give, in the file's terms. */
export const CARRIED_ROOM: usize = 16;
/** u32: the first iovec. */
export const CARRIED_IOVECS: usize = 20;
/** u32, of a frame that was read and is to be delivered from its bounce: bytes, net header included; 0: none. */
export const CARRIED_HELD: usize = 28;
/** u32, u64: where the guest has its net header. */
export const CARRIED_HEADER_SEGMENT: usize = 32;
export const CARRIED_HEADER: usize = 40;

const IOVEC_LENGTH: usize = 8;
const SEGMENT_BYTES: u64 = (<u64>SEGMENT_PAGES) << 16;

/** The kernel did not take the request. */
export const NOT_TAKEN: i32 = i32.MIN_VALUE;
/** There is nothing to read, or no room. */
export const EAGAIN: i32 = -11;
export const EFAULT: i32 = -14;
export const EINVAL: i32 = -22;
/** The interface is down, or is not there any more. */
export const EIO: i32 = -5;
export const EBADFD: i32 = -77;

/** Requests of this batch, and the number of the first one. */
export let requests: u32 = 0;
let first: u32 = 0;
/** Behind the last iovec. */
export let iovecsEnd: usize = IOVECS;

/** A batch begins. */
export function beginRequests(): void {
  first = load<u32>(load<u32>(REQUEST_FORMAT, FORMAT_TAIL));
  requests = 0;
  iovecsEnd = IOVECS;
}

/** The record of a request; that of the next one is carried(requests). */
export function carried(number: u32): usize {
  return CARRIED + <usize>number * CARRIED_BYTES;
}

/** Room for a frame, of a request: header of NET_HDR_SIZE, then the frame. */
export function bounce(number: u32): usize {
  return BOUNCES + <usize>number * BOUNCE_BYTES;
}

/** How many iovecs this batch may still have. */
export function batchIovecsLeft(): u32 {
  return IOVECS_MAX - <u32>((iovecsEnd - IOVECS) / IOVEC_BYTES);
}

/** Process address of a place in memory 0. */
export function ownAddress(at: usize): u64 {
  return load<u64>(MEMORY_BASES) + at;
}

/** Process address of a place in a segment of the guest. */
export function guestAddress(segment: u32, offset: u64): u64 {
  return load<u64>(MEMORY_BASES + 8 + ((<usize>segment) << 3)) + offset;
}

/** Takes back the iovecs from `iovecs` on. */
export function dropIovecs(iovecs: usize): void {
  iovecsEnd = iovecs;
}

export function addIovec(address: u64, length: u32): void {
  store<u64>(iovecsEnd, address);
  store<u64>(iovecsEnd, length, IOVEC_LENGTH);
  iovecsEnd += IOVEC_BYTES;
}

/** Makes a request of the iovecs from `iovecs` on. */
export function addRequest(iovecs: usize): void {
  const count = <u32>((iovecsEnd - iovecs) / IOVEC_BYTES);
  // A vector of one costs the kernel more than none.
  if (count == 1) addWhole(load<u64>(iovecs), load<u32>(iovecs, IOVEC_LENGTH));
  else add(load<u32>(REQUEST_FORMAT, FORMAT_VECTOR), ownAddress(iovecs), count);
}

/** Makes a request of one stretch of memory. */
export function addWhole(address: u64, length: u32): void {
  add(load<u32>(REQUEST_FORMAT, FORMAT_WHOLE), address, length);
}

function add(operation: u32, address: u64, length: u32): void {
  const request = REQUESTS + <usize>((first + requests) & (REQUESTS_MAX - 1)) * REQUEST_BYTES;
  store<u8>(request + load<u32>(REQUEST_FORMAT, FORMAT_OPERATION), <u8>operation);
  store<u64>(request + load<u32>(REQUEST_FORMAT, FORMAT_ADDRESS), address);
  store<u32>(request + load<u32>(REQUEST_FORMAT, FORMAT_LENGTH), length);
  store<i32>(carried(requests), NOT_TAKEN, CARRIED_RESULT);
  ++requests;
}

/** All requests are made. @returns how many there are to hand over */
export function endRequests(): u32 {
  store<u32>(load<u32>(REQUEST_FORMAT, FORMAT_TAIL), first + requests);
  return requests;
}

/** Writes what came of each request into its record. */
export function takeCompletions(): void {
  const headAt = <usize>load<u32>(REQUEST_FORMAT, FORMAT_DONE_HEAD);
  const mask = load<u32>(REQUEST_FORMAT, FORMAT_DONE_MASK);
  const done = <usize>load<u32>(REQUEST_FORMAT, FORMAT_DONE);
  const shift = load<u32>(REQUEST_FORMAT, FORMAT_DONE_SHIFT);
  const result = <usize>load<u32>(REQUEST_FORMAT, FORMAT_DONE_RESULT);
  const tail = load<u32>(load<u32>(REQUEST_FORMAT, FORMAT_DONE_TAIL));
  let head = load<u32>(headAt);
  for (; head != tail; ++head) {
    const completion = done + ((<usize>(head & mask)) << shift);
    const number = (load<u32>(completion) - first) & (REQUESTS_MAX - 1);
    if (number < requests) store<i32>(carried(number), load<i32>(completion + result), CARRIED_RESULT);
  }
  store<u32>(headAt, head);
}

/** Copies the first `length` bytes of a record's iovecs to memory 0. */
export function copyBack<E>(record: usize, to: usize, length: u32): void {
  for (let iovec = <usize>load<u32>(record, CARRIED_IOVECS); length != 0; iovec += IOVEC_BYTES) {
    const address = load<u64>(iovec);
    const part = min(length, load<u32>(iovec, IOVEC_LENGTH));
    const own = address - load<u64>(MEMORY_BASES);
    if (own < <u64>(memory.size() << 16)) memory.copy(to, <usize>own, part);
    else {
      let segment: u32 = 0;
      while (segment + 1 < <u32>SEGMENTS_MAX && address - guestAddress(segment, 0) >= SEGMENT_BYTES) ++segment;
      copyFrom<E>(to, segment, address - guestAddress(segment, 0), part);
    }
    to += part;
    length -= part;
  }
}

/** Copies guest memory to memory 0. */
export function copyFrom<E>(to: usize, segment: u32, from: u64, length: u32): void {
  let i: u32 = 0;
  for (; i + 8 <= length; i += 8) store<u64>(to + i, load64(end<E>(), segment, from + i));
  for (; i < length; ++i) store<u8>(to + i, <u8>load8(end<E>(), segment, from + i));
}
