/** A relay takes over from a back-end that was killed with buffers in its hands; and is killed itself. */
import { mkdtempSync, readSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { drain, eventfdCreate } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { Relay, type RelayEvent } from "../../src/index.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1 } from "../../src/layout/virtio.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

const SIZE = 16;
const MEMORY = 0x10000;
const USED_AT = 0x3000;

let directory: string;
let path: string;
let open: AsyncDisposableStack;
let guest: number;
let events: RelayEvent[];

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  path = join(directory, "vm.sock");
  open = new AsyncDisposableStack();
  guest = own(memfdCreate("guest", MEMORY));
  events = [];
});
afterEach(async () => {
  await open.disposeAsync();
  rmSync(directory, { recursive: true });
});

function own(fd: number): number {
  open.defer(() => close(fd));
  return fd;
}

/** A front-end that has said all but the ring's. */
async function connect(...features: number[]): Promise<Frontend> {
  const frontend = open.use(Frontend.connect(path));
  const mask = (...bits: number[]) => bits.reduce((sum, bit) => sum | (1n << BigInt(bit)), 0n);
  await frontend.setProtocolFeatures(mask(L.VHOST_USER_PROTOCOL_F_REPLY_ACK, L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD));
  await frontend.setFeatures(mask(VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, ...features));
  await frontend.setMemTable([{ gpa: 0n, sizeBytes: BigInt(MEMORY), userAddress: 0n, mmapOffset: 0n, fd: guest }]);
  return frontend;
}

/** Starts a ring: areas at 0x1000, 0x2000 and 0x3000, those of ring 1 behind 0x4000. Returns its call fd. */
async function start(frontend: Frontend, index: number, base: number): Promise<number> {
  const call = own(eventfdCreate());
  const at = BigInt(index * 0x4000);
  await frontend.setVringNum(index, SIZE);
  await frontend.setVringBase(index, base);
  await frontend.setVringAddr(index, { desc: at + 0x1000n, avail: at + 0x2000n, used: at + BigInt(USED_AT) });
  await frontend.setVringCall(index, call);
  await frontend.setVringKick(index);
  return call;
}

function guestU16(at: number, value?: number): number {
  const bytes = new Uint16Array(1);
  if (value === undefined) readSync(guest, bytes, 0, 2, at);
  else writeSync(guest, Uint16Array.of(value), 0, 2, at);
  return bytes[0] as number;
}

describe("PROTOCOL, 17: a receiveq with an inflight region", () => {
  it("gives back what another back-end held, and goes on behind it", async () => {
    open.use(
      await Relay.start({ links: [[`vhost-user:${path}`, "loopback"]], onEvent: (event) => events.push(event) }),
    );
    const frontend = await connect();
    const region = await frontend.getInflightFd(2, SIZE);
    if (!region) throw new Error("no region");
    own(region.fd);
    // Another one had used 5 buffers, and held those of heads 9 and 4 when it died.
    const header = Uint16Array.of(1, SIZE, 0, 5);
    writeSync(region.fd, header, 0, 8, L.INFLIGHT_VERSION);
    for (const [head, counter] of [
      [9, 100n],
      [4, 101n],
    ] as const) {
      const at = L.INFLIGHT_SPLIT_ENTRIES + head * L.INFLIGHT_SPLIT_ENTRY_SIZE;
      writeSync(region.fd, Uint8Array.of(1), 0, 1, at);
      writeSync(region.fd, BigUint64Array.of(counter), 0, 8, at + L.INFLIGHT_SPLIT_COUNTER);
    }
    guestU16(0x2002, 7);
    guestU16(USED_AT + 2, 5);
    await frontend.setInflightFd(region);
    const call = await start(frontend, 0, 7);
    await start(frontend, 1, 0);

    expect(guestU16(USED_AT + 2)).toBe(7);
    const id = (used: number) => guestU16(USED_AT + 4 + used * 8);
    expect([id(5), id(6)]).toEqual([9, 4]);
    await expect.poll(() => drain(call)).toBeGreaterThan(0n);
    expect(await frontend.getVringBase(0)).toBe(7);
    expect(events.filter(({ type }) => type === "refusal")).toEqual([]);
  });

  it("BI-142: says that a region is of no use, and runs the ring without it", async () => {
    open.use(
      await Relay.start({ links: [[`vhost-user:${path}`, "loopback"]], onEvent: (event) => events.push(event) }),
    );
    const frontend = await connect();
    const region = await frontend.getInflightFd(2, SIZE);
    if (!region) throw new Error("no region");
    own(region.fd);
    writeSync(region.fd, Uint16Array.of(2), 0, 2, L.INFLIGHT_VERSION);
    await frontend.setInflightFd(region);
    guestU16(USED_AT + 2, 3);
    await start(frontend, 0, 3);
    expect(await frontend.getVringBase(0)).toBe(3);
    expect(events).toContainEqual(expect.objectContaining({ type: "refusal", request: "SET_INFLIGHT_FD" }));
  });
});

describe("PROTOCOL, 17: a transmitq with an inflight region", () => {
  /** Where ring 1 has its part. */
  const PART = { split: 320, packed: 576 };
  const RING = 0x4000;
  const FRAMES = 5;

  /** Descriptors 0 to 4 are a frame of 60 bytes each, and available. */
  function transmit(form: "split" | "packed"): void {
    for (let n = 0; n < FRAMES; n++) {
      const at = RING + 0x1000 + n * 16;
      writeSync(guest, BigUint64Array.of(BigInt(0xc000 + n * 128), 72n), 0, 16, at);
      if (form === "packed") writeSync(guest, Uint16Array.of(n, 1 << 7), 0, 4, at + 12);
      else guestU16(RING + 0x2004 + n * 2, n);
    }
    if (form === "split") guestU16(RING + 0x2002, FRAMES);
  }

  it.each([
    ["split", [], L.INFLIGHT_SPLIT_USED_IDX, [FRAMES]],
    ["packed", [VIRTIO_F_RING_PACKED], L.INFLIGHT_PACKED_USED_IDX, [FRAMES, FRAMES, 0x0101]],
  ] as const)(
    "%s: says how far the ring is; the next back-end goes on there, whatever the base",
    async (form, features, at, words) => {
      open.use(
        await Relay.start({ links: [[`vhost-user:${path}`, "loopback"]], onEvent: (event) => events.push(event) }),
      );
      const first = await connect(...features);
      const region = await first.getInflightFd(2, SIZE);
      if (!region) throw new Error("no region");
      own(region.fd);
      await first.setInflightFd(region);
      transmit(form);
      await start(first, 1, 0);
      const used = () => {
        const found = new Uint16Array(words.length);
        readSync(region.fd, found, 0, found.byteLength, PART[form] + at);
        return [...found];
      };
      await expect.poll(used).toEqual(words);
      first[Symbol.dispose]();

      const second = await connect(...features);
      await second.setInflightFd(region);
      await start(second, 1, form === "packed" ? 0x8002_8002 : 2);
      const goesOn = form === "packed" ? 0x8005_8005 : FRAMES;
      expect(await second.getVringBase(1)).toBe(goesOn);
      expect(used()).toEqual(words);
      expect(events.filter(({ type }) => type === "refusal")).toEqual([]);
    },
  );
});
