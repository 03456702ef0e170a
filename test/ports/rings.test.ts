/** Rings whose indexes and signals are not what they should be, through a real relay; the test is front-end and driver. */
import { mkdtempSync, readSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { drain, eventfdCreate, signal } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { Relay, type RelayEvent } from "../../src/index.ts";
import { VHOST_USER_PROTOCOL_F_REPLY_ACK } from "../../src/layout/vhost-user.ts";
import {
  AVAIL_RING,
  RECEIVEQ,
  TRANSMITQ,
  USED_RING,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_VERSION_1,
} from "../../src/layout/virtio.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

const SIZE = 16;
const MEMORY = 0x10000;
/** Areas of ring n, from n * 0x4000. */
const AVAIL = 0x2000;
const USED = 0x3000;
const BUFFER = 0xc000;

let directory: string;
let path: string;
let open: AsyncDisposableStack;
let guest: number;
let relay: Relay;
let frontend: Frontend;
let events: RelayEvent[];

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  path = join(directory, "vm.sock");
  open = new AsyncDisposableStack();
  open.defer(() => rmSync(directory, { recursive: true }));
  guest = own(memfdCreate("guest", MEMORY));
  events = [];
  relay = open.use(
    await Relay.start({ links: [[`vhost-user:${path}`, "loopback"]], onEvent: (event) => events.push(event) }),
  );
  frontend = open.use(Frontend.connect(path));
  await frontend.setProtocolFeatures(1n << BigInt(VHOST_USER_PROTOCOL_F_REPLY_ACK));
  await frontend.setFeatures((1n << BigInt(VIRTIO_F_VERSION_1)) | (1n << BigInt(VHOST_USER_F_PROTOCOL_FEATURES)));
  await frontend.setMemTable([{ gpa: 0n, sizeBytes: BigInt(MEMORY), userAddress: 0n, mmapOffset: 0n, fd: guest }]);
});
afterEach(() => open.disposeAsync());

function own(fd: number): number {
  open.defer(() => close(fd));
  return fd;
}

async function start(index: number, { base = 0, kick = own(eventfdCreate()), call = own(eventfdCreate()) } = {}) {
  const at = BigInt(index * 0x4000);
  await frontend.setVringNum(index, SIZE);
  await frontend.setVringBase(index, base);
  await frontend.setVringAddr(index, { desc: at + 0x1000n, avail: at + BigInt(AVAIL), used: at + BigInt(USED) });
  await frontend.setVringCall(index, call);
  await frontend.setVringKick(index, kick);
  return { kick, call };
}

function u16(at: number): number {
  const bytes = new Uint16Array(1);
  readSync(guest, bytes, 0, 2, at);
  return bytes[0] as number;
}

function setU16(at: number, ...values: number[]): void {
  writeSync(guest, Uint16Array.from(values), 0, 2 * values.length, at);
}

/** Makes buffers available on the transmitq from an avail index on; descriptor n is buffer n, a frame of 60 bytes. */
function transmit(from: number, count: number): void {
  const at = TRANSMITQ * 0x4000;
  for (let n = from; n < from + count; n++) {
    const slot = n % SIZE;
    writeSync(guest, BigUint64Array.of(BigInt(BUFFER + slot * 128), 72n), 0, 16, at + 0x1000 + slot * 16);
    setU16(at + AVAIL + AVAIL_RING + slot * 2, slot);
  }
  setU16(at + AVAIL + 2, from + count);
}

const usedIndex = () => u16(TRANSMITQ * 0x4000 + USED + 2);
const broken = () => events.filter(({ type }) => type === "broken");

describe("indexes", () => {
  it.each([0, 7, 9])(
    "BI-122: a ring goes on at its used index, whatever base (%i) the front-end has kept",
    async (base) => {
      setU16(TRANSMITQ * 0x4000 + USED + 2, 7);
      transmit(7, 1);
      await start(TRANSMITQ, { base });
      await expect.poll(usedIndex).toBe(8);
      expect(u16(TRANSMITQ * 0x4000 + USED + USED_RING + 7 * 8), "the buffer at index 7, in used entry 7").toBe(7);
      expect(await frontend.getVringBase(TRANSMITQ)).toBe(8);
      expect(usedIndex()).toBe(8);
    },
  );

  it("BI-119, BI-127: avail further ahead than the ring is long: broken, the err fd signalled once, messages still served", async () => {
    const err = own(eventfdCreate());
    setU16(TRANSMITQ * 0x4000 + AVAIL + 2, SIZE + 1);
    await frontend.setVringErr(TRANSMITQ, err);
    const { kick } = await start(TRANSMITQ);
    await expect.poll(() => broken().length).toBe(1);
    for (let round = 0; round < 20; round++) {
      signal(kick);
      await frontend.setVringEnable(TRANSMITQ, true);
    }
    expect(drain(err)).toBe(1n);
    expect(broken()).toHaveLength(1);
    expect(usedIndex()).toBe(0);

    // Started anew it works
    expect(await frontend.getVringBase(TRANSMITQ)).toBe(0);
    transmit(0, 2);
    await start(TRANSMITQ);
    await expect.poll(usedIndex).toBe(2);
  });

  it("BI-127: without an err fd it is broken in silence", async () => {
    setU16(TRANSMITQ * 0x4000 + AVAIL + 2, SIZE + 1);
    await start(TRANSMITQ);
    await expect.poll(() => broken().length).toBe(1);
    expect(await frontend.getVringBase(TRANSMITQ)).toBe(0);
  });

  it("BI-129: GET_VRING_BASE in the middle of work answers what is completed, no less and no more", async () => {
    const rounds = 50;
    for (let round = 0, next = 0; round < rounds; round++) {
      setU16(TRANSMITQ * 0x4000 + AVAIL + 2, next);
      const { kick } = await start(TRANSMITQ, { base: next });
      transmit(next, SIZE);
      signal(kick);
      next = await frontend.getVringBase(TRANSMITQ);
      expect(usedIndex(), `round ${round}`).toBe(next);
    }
  });
});

describe("signals", () => {
  it("BI-028: one eventfd for kick and call of both rings: it does not kick itself for ever", async () => {
    const fd = own(eventfdCreate());
    await start(RECEIVEQ, { kick: fd, call: fd });
    await start(TRANSMITQ, { kick: fd, call: fd });
    transmit(0, 8);
    signal(fd);
    await expect.poll(usedIndex).toBe(8);
    const kicks = () => relay.state.links[0]?.lanes.reduce((sum, lane) => sum + lane.kicks, 0);
    const settled = async () => {
      const before = kicks();
      await sleep(100);
      return kicks() === before;
    };
    await expect.poll(settled).toBe(true);
    expect(kicks()).toBeLessThan(100);
  });
});
