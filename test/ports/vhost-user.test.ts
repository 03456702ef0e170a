/** What a vhost-user port offers, what its options change, and how it finds the place where a packed ring goes on. */
import { mkdtempSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { listen } from "../../native/socket.ts";
import { Relay, type PortText } from "../../src/index.ts";
import * as L from "../../src/layout/vhost-user.ts";
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_RING_RESET,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_MAC,
  VIRTIO_NET_F_MTU,
  VIRTIO_NET_F_STATUS,
} from "../../src/layout/virtio.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

const REPLY_ACK = L.VHOST_USER_PROTOCOL_F_REPLY_ACK;
const { VHOST_USER_PROTOCOL_F_CONFIG: CONFIG, VHOST_USER_PROTOCOL_F_MTU: MTU, VHOST_USER_PROTOCOL_F_MQ: MQ } = L;

let directory: string;
let path: string;
let open: AsyncDisposableStack;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  path = join(directory, "vm.sock");
  open = new AsyncDisposableStack();
});
afterEach(async () => {
  await open.disposeAsync();
  rmSync(directory, { recursive: true });
});

/** A front-end of the port, and the bits that it is offered. */
async function connect(port: PortText) {
  const relay = open.use(await Relay.start({ links: [[port, "loopback"]] }));
  const frontend = open.use(Frontend.connect(path));
  const features = bits(await frontend.getFeatures());
  const protocol = bits(await frontend.getProtocolFeatures());
  const mtu = (): number | null | undefined => relay.state.links[0]?.ports[0].mtu;
  return { frontend, features, protocol, mtu };
}

function bits(mask: bigint): number[] {
  return Array.from({ length: 64 }, (_, bit) => bit).filter((bit) => (mask >> BigInt(bit)) & 1n);
}

async function negotiate(frontend: Frontend, ...protocol: number[]): Promise<void> {
  await frontend.setProtocolFeatures(protocol.reduce((mask, bit) => mask | (1n << BigInt(bit)), 0n));
}

describe("without options", () => {
  it("neither MAC address nor MTU is offered: user-mode Linux takes all that is, and reads the configuration space", async () => {
    const { features, protocol, mtu } = await connect(`vhost-user:${path}`);
    for (const bit of [VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS]) expect(features).not.toContain(bit);
    for (const bit of [CONFIG, MTU]) expect(protocol).not.toContain(bit);
    expect(mtu()).toBeNull();
  });
});

describe("mac=", () => {
  it("offers VIRTIO_NET_F_MAC and serves the address; no MTU", async () => {
    const { frontend, features, protocol } = await connect(`vhost-user:${path},mac=52:54:00:12:34:56,queues=3`);
    expect(features).toContain(VIRTIO_NET_F_MAC);
    expect(features).not.toContain(VIRTIO_NET_F_MTU);
    expect(protocol).not.toContain(MTU);
    await negotiate(frontend, REPLY_ACK, CONFIG);
    const config = await frontend.getConfig({ offset: 0, size: 12 });
    expect(config.toString("hex", 0, 6)).toBe("525400123456");
    const [status, pairs, mtu] = [6, 8, 10].map((at) => config.readUInt16LE(at));
    expect({ status, pairs, mtu }).toEqual({ status: 1, pairs: 3, mtu: 0 });
  });
});

describe("mtu=", () => {
  it("offers VIRTIO_NET_F_MTU and serves it; no MAC address", async () => {
    const { frontend, features, protocol, mtu } = await connect(`vhost-user:${path},mtu=9000`);
    expect(features).toContain(VIRTIO_NET_F_MTU);
    expect(features).not.toContain(VIRTIO_NET_F_MAC);
    expect(protocol).toContain(MTU);
    await negotiate(frontend, REPLY_ACK, CONFIG);
    expect((await frontend.getConfig({ offset: 10, size: 2 })).readUInt16LE()).toBe(9000);
    expect(mtu()).toBe(9000);
  });

  it("NET_SET_MTU takes its place, until the front-end is gone", async () => {
    const { frontend, mtu } = await connect(`vhost-user:${path},mtu=9000`);
    await negotiate(frontend, REPLY_ACK, CONFIG, MTU);
    await frontend.netSetMtu(1500);
    expect(mtu()).toBe(1500);
    expect((await frontend.getConfig({ offset: 10, size: 2 })).readUInt16LE()).toBe(1500);
    frontend[Symbol.dispose]();
    await expect.poll(mtu).toBe(9000);
  });
});

describe("queue-unit=", () => {
  it.each([
    ["", 3],
    [",queue-unit=pairs", 3],
    [",queue-unit=vrings", 6],
  ])("PROTOCOL, 13.2: %j, three pairs: GET_QUEUE_NUM is %i", async (option, count) => {
    const { frontend } = await connect(`vhost-user:${path},queues=3${option}`);
    await negotiate(frontend, REPLY_ACK, MQ);
    expect(await frontend.getQueueNum()).toBe(count);
  });
});

it("{ fd } serves a socket that the program opened", async () => {
  const { features } = await connect({ fd: listen(path) });
  expect(features).toContain(32);
});

describe("packed rings", () => {
  const SIZE = 16;
  const AVAIL = 1 << 7;
  const USED = 1 << 15;

  /** Starts receiveq 0, whose descriptors have these flags, and stops it again. */
  async function baseOf(base: number, flags: number[]): Promise<number> {
    const { frontend, features } = await connect(`vhost-user:${path}`);
    for (const bit of [VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_RESET]) expect(features).toContain(bit);
    const acknowledged = [VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED, VHOST_USER_F_PROTOCOL_FEATURES];
    await negotiate(frontend, REPLY_ACK);
    await frontend.setFeatures(acknowledged.reduce((mask, bit) => mask | (1n << BigInt(bit)), 0n));
    const fd = memfdCreate("guest", 0x10000);
    for (const [slot, value] of flags.entries()) writeSync(fd, Uint16Array.of(value), 0, 2, 0x1000 + slot * 16 + 14);
    await frontend.setMemTable([{ gpa: 0n, sizeBytes: 0x10000n, userAddress: 0n, mmapOffset: 0n, fd }]);
    close(fd);
    await frontend.setVringNum(0, SIZE);
    await frontend.setVringBase(0, base);
    await frontend.setVringAddr(0, { desc: 0x1000n, avail: 0x2000n, used: 0x3000n });
    await frontend.setVringKick(0);
    return frontend.getVringBase(0);
  }

  it("PROTOCOL, 5: the base counts where the ring does not belie it", async () => {
    expect(await baseOf(0x8000_8000, Array(SIZE).fill(AVAIL))).toBe(0x8000_8000);
  });

  it("PROTOCOL, 5: a back-end that was killed left its position in the ring", async () => {
    const flags = Array.from({ length: SIZE }, (_, slot) => (slot < 5 ? AVAIL | USED : AVAIL));
    expect(await baseOf(0x8000_8000, flags)).toBe(0x8005_8005);
  });
});
