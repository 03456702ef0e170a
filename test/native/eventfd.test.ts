/** Signals: native/eventfd.ts. */
import { openSync, writeSync, closeSync, readFileSync } from "node:fs";
import { expect, it } from "vitest";
import { drain, eventfdCreate, signal, signalPeer } from "../../native/eventfd.ts";
import { close, libc } from "../../native/libc.ts";
import { receive, socketpair } from "../../native/socket.ts";

const F_SETFL = 4;
const fcntl = libc.func("int fcntl(int fd, int command, int argument)");

it("a signal adds 1, ours or a peer's", () => {
  const fd = eventfdCreate();
  expect([signal(fd), signalPeer(fd), signalPeer(fd)]).toEqual([true, true, true]);
  expect(drain(fd)).toBe(3n);
  close(fd);
});

it("thousands of them in a row are all counted", () => {
  const fd = eventfdCreate();
  for (let i = 0; i < 5000; i++) expect(signalPeer(fd)).toBe(true);
  expect(drain(fd)).toBe(5000n);
  close(fd);
});

it("BI-026: a full eventfd that its owner made blocking holds nobody up", () => {
  const fd = eventfdCreate();
  writeSync(fd, new BigUint64Array([0xffff_ffff_ffff_fffen]));
  expect(fcntl(fd, F_SETFL, 0)).toBe(0);
  signalPeer(fd); // a write would never return
  expect(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8")).toMatch(/eventfd-count: *ffffffffffffff/);
  close(fd);
});

it("a socket gets eight bytes, a full or closed one nothing, and nothing blocks", () => {
  const [ours, theirs] = socketpair();
  expect(fcntl(theirs, F_SETFL, 0)).toBe(0);
  expect(signalPeer(theirs)).toBe(true);
  expect(receive(ours, Buffer.alloc(16))?.count).toBe(8);
  for (let i = 0; i < 1_000_000 && signalPeer(theirs); i++);
  expect(signalPeer(theirs)).toBe(false);
  close(ours);
  expect(signalPeer(theirs)).toBe(false);
  close(theirs);
});

it("what is neither is left alone", () => {
  const file = openSync("/dev/null", "r");
  expect(signalPeer(file)).toBe(false);
  closeSync(file);
});
