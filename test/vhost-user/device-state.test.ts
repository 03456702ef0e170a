/** SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE, through real pipes. */
import { closeSync, constants, openSync, readSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { pipe, setNonBlocking } from "../../native/fd.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { decodeU64 } from "../../src/vhost-user/codec.ts";
import type { Frontend } from "../../src/vhost-user/frontend.ts";
import { STATE_TIMEOUT_MS } from "../../src/vhost-user/limits.ts";
import { barrier, BIT_30, EVENT_IDX, negotiated, Rig, started, USUAL_PROTOCOL_FEATURES, VERSION_1 } from "./rig.ts";

const SAVE = 0;
const LOAD = 1;
const REFUSED = 0x101n;
const TAKEN = 0x100n;

function pipeOf(rig: Rig): { read: number; write: number } {
  const [read, write] = pipe();
  return { read: rig.own(read), write };
}

async function transfer(frontend: Frontend, direction: number, fds: number[], phase = 0): Promise<bigint> {
  const payload = Buffer.alloc(8);
  payload.writeUInt32LE(direction, L.DEVICE_STATE_DIRECTION);
  payload.writeUInt32LE(phase, L.DEVICE_STATE_PHASE);
  return decodeU64(await frontend.request(L.VHOST_USER_SET_DEVICE_STATE_FD, payload, fds));
}

async function check(frontend: Frontend): Promise<bigint> {
  return decodeU64(await frontend.request(L.VHOST_USER_CHECK_DEVICE_STATE));
}

/** What the back-end saves. */
async function saved(rig: Rig, frontend: Frontend): Promise<Buffer> {
  const { read, write } = pipeOf(rig);
  expect(await transfer(frontend, SAVE, [write])).toBe(TAKEN);
  closeSync(write);
  expect(await check(frontend)).toBe(0n);
  const bytes = Buffer.alloc(4096);
  const length = readSync(read, bytes);
  expect(readSync(read, Buffer.alloc(1)), "the back-end has closed the pipe").toBe(0);
  return bytes.subarray(0, length);
}

/** What CHECK_DEVICE_STATE says to these bytes. */
async function loaded(rig: Rig, frontend: Frontend, bytes: Buffer): Promise<bigint> {
  const { read, write } = pipeOf(rig);
  expect(await transfer(frontend, LOAD, [read])).toBe(TAKEN);
  writeSync(write, bytes);
  closeSync(write);
  return check(frontend);
}

describe("PROTOCOL, 19: device state", () => {
  it("what is saved is taken again, by this device and another connection", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const state = await saved(rig, frontend);
    expect(await loaded(rig, frontend, state)).toBe(0n);
    expect(rig.refusals).toEqual([]);
  });

  it("has the features that the driver acknowledged; a device that does not offer them all refuses it", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setFeatures(VERSION_1 | EVENT_IDX | BIT_30);
    const state = await saved(rig, frontend);
    expect(state.readBigUInt64LE(16)).toBe(VERSION_1 | EVENT_IDX | BIT_30);
    rig.device.features = VERSION_1;
    expect(await loaded(rig, frontend, state)).toBe(1n);
  });

  it.each([
    ["nothing", (_state: Buffer) => Buffer.alloc(0)],
    ["a byte less", (state: Buffer) => state.subarray(0, -1)],
    ["a byte more", (state: Buffer) => Buffer.concat([state, Buffer.alloc(1)])],
    ["far too much", (state: Buffer) => Buffer.concat([state, Buffer.alloc(4000)])],
    ["another magic", (state: Buffer) => Buffer.concat([Buffer.from("x"), state.subarray(1)])],
    ["another version", (state: Buffer) => Buffer.concat([state.subarray(0, 8), Buffer.of(2), state.subarray(9)])],
  ])("a state of %s is refused", async (_name, change) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await loaded(rig, frontend, change(await saved(rig, frontend)))).toBe(1n);
  });

  it("CHECK_DEVICE_STATE without a transfer, or a second time, says no", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await check(frontend)).toBe(1n);
    await saved(rig, frontend);
    expect(await check(frontend)).toBe(1n);
  });

  it.each([
    ["direction 2", 2, 0],
    ["phase 1", SAVE, 1],
  ])("BI-163: %s is refused", async (_name, direction, phase) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const { write } = pipeOf(rig);
    rig.own(write);
    expect(await transfer(frontend, direction, [write], phase)).toBe(REFUSED);
    expect(await transfer(frontend, SAVE, [])).toBe(REFUSED);
    expect(await transfer(frontend, SAVE, [write, write])).toBe(REFUSED);
  });

  it("BI-163: the wrong end of a pipe, or no pipe, is refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const { read, write } = pipeOf(rig);
    rig.own(write);
    expect(await transfer(frontend, SAVE, [read])).toBe(REFUSED);
    expect(await transfer(frontend, LOAD, [write])).toBe(REFUSED);
    expect(await transfer(frontend, LOAD, [rig.memfd()])).toBe(REFUSED);
    expect(await transfer(frontend, SAVE, [rig.eventfd()])).toBe(REFUSED);
  });

  it("BI-163: a pipe that nobody empties blocks nobody; the next transfer takes its place", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const { write } = pipeOf(rig);
    rig.own(write);
    const filler = rig.own(openSync(`/proc/self/fd/${write}`, constants.O_WRONLY | constants.O_NONBLOCK));
    try {
      for (;;) writeSync(filler, Buffer.alloc(4096));
    } catch (error) {
      expect((error as NodeJS.ErrnoException).code).toBe("EAGAIN");
    }
    expect(await transfer(frontend, SAVE, [write])).toBe(TAKEN);
    await barrier(frontend);
    await saved(rig, frontend);
  });

  it("BI-163: a load whose other end stays silent ends with the session", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const { read, write } = pipeOf(rig);
    rig.own(write);
    setNonBlocking(write);
    expect(await transfer(frontend, LOAD, [read])).toBe(TAKEN);
    await barrier(frontend);
  });

  it("a CHECK_DEVICE_STATE that waits for a silent peer does not hold up the end of the back-end", async () => {
    await using rig = new Rig();
    const server = rig.serve();
    const frontend = rig.connect();
    await frontend.setProtocolFeatures(USUAL_PROTOCOL_FEATURES);
    const { read, write } = pipeOf(rig);
    rig.own(write);
    const startMs = performance.now();
    expect(await transfer(frontend, LOAD, [read])).toBe(TAKEN);
    const answer = check(frontend).catch(() => "none");
    await sleep(50);
    await server[Symbol.asyncDispose]();
    expect(performance.now() - startMs, "before the transfer's deadline").toBeLessThan(STATE_TIMEOUT_MS);
    expect(await answer).toBe("none");
  });

  it("while a ring is started it is refused", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const { write } = pipeOf(rig);
    rig.own(write);
    expect(await transfer(frontend, SAVE, [write])).toBe(REFUSED);
  });
});
