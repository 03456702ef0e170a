/** GET_INFLIGHT_FD and SET_INFLIGHT_FD: which regions are made and taken. What is in them: test/ports/recover.test.ts. */
import { openSync, statSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { addSeals, F_SEAL_GROW, F_SEAL_SHRINK, getSeals } from "../../native/memfd.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { encodeInflight } from "../../src/vhost-user/codec.ts";
import type { InflightRecord } from "../../src/vhost-user/codec.ts";
import type { Frontend } from "../../src/vhost-user/frontend.ts";
import {
  ackOf,
  AREAS,
  BIT_30,
  BASE_INFLIGHT,
  INFLIGHT,
  negotiated,
  openFds,
  ready,
  RING_SIZE,
  SKIP_DRAIN,
  USUAL_PROTOCOL_FEATURES,
  VERSION_1,
} from "./rig.ts";
import type { Rig } from "./rig.ts";

/** Bytes of a split ring's part: 16 and 16 an entry. */
const STRIDE = 16 + 16 * RING_SIZE + 48;
const RECORD = { mmapSize: BigInt(2 * STRIDE), mmapOffset: 0n, queues: 2, queueSize: RING_SIZE };

function inode(fd: number): number {
  return statSync(`/proc/self/fd/${fd}`).ino;
}

/** A region as a front-end returns it after the back-end that made it was killed. */
function regionFd(rig: Rig, bytes = 8192 * 2): number {
  return rig.memfd(bytes);
}

function ackOfRegion(frontend: Frontend, record: Partial<InflightRecord>, fds: number[]): Promise<bigint> {
  return ackOf(frontend, L.VHOST_USER_SET_INFLIGHT_FD, encodeInflight({ ...RECORD, ...record }), fds);
}

describe("GET_INFLIGHT_FD", () => {
  it.each([
    ["split", 0n, STRIDE],
    ["packed", 1n << BigInt(VIRTIO_F_RING_PACKED), 32 + 32 * RING_SIZE + 32],
  ])(
    "PROTOCOL, 17: makes a zero memfd of whole pages for %s rings, that nobody can resize",
    async (_name, bit, stride) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      rig.device.features |= bit;
      await frontend.setFeatures(VERSION_1 | BIT_30 | bit);
      const region = await frontend.getInflightFd(4, RING_SIZE);
      expect(region).toMatchObject({ mmapOffset: 0n, queues: 4, queueSize: RING_SIZE });
      const fd = rig.own(region?.fd as number);
      expect(Number(region?.mmapSize)).toBe(Math.ceil((4 * stride) / 4096) * 4096);
      expect(statSync(`/proc/self/fd/${fd}`).size).toBe(Number(region?.mmapSize));
      expect(getSeals(fd)).toBe(F_SEAL_SHRINK | F_SEAL_GROW);
    },
  );

  it.each([
    [0, 256],
    [5, 256],
    [65535, 256],
    [4, 0],
    [4, 32769],
    [4, 65535],
  ])("BI-134: for %i queues of %i entries it is refused: mmap size 0, no fd", async (queues, queueSize) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await frontend.getInflightFd(queues, queueSize)).toBeUndefined();
    expect(rig.refusals).toEqual(["GET_INFLIGHT_FD"]);
  });

  it("BI-136: asked again and again, the back-end keeps none of them", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const before = openFds();
    for (let round = 0; round < 1000; round++) {
      close((await frontend.getInflightFd(4, 1024))?.fd as number);
    }
    expect(openFds()).toBe(before);
  });

  it("BI-141: with an fd it is refused, the fd closed", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const reply = await frontend.request(L.VHOST_USER_GET_INFLIGHT_FD, encodeInflight(RECORD), [rig.memfd()]);
    expect(reply.equals(Buffer.alloc(L.INFLIGHT_SIZE))).toBe(true);
  });
});

describe("SET_INFLIGHT_FD", () => {
  it("PROTOCOL, 17: every ring of the region gets its part when it starts, the others get none", async () => {
    const { rig, frontend } = await ready(1);
    await using _ = rig;
    const fd = regionFd(rig, 4096 + 2 * STRIDE);
    await frontend.setInflightFd({ ...RECORD, mmapOffset: 4096n, fd });
    await frontend.setVringKick(1, rig.eventfd());
    const { inflight } = rig.device.lastVring;
    expect(inflight).toEqual({ fd: expect.any(Number), offset: 4096n + BigInt(STRIDE) });
    expect(inode(inflight?.fd as number)).toBe(inode(fd));
    await frontend.setVringNum(2, RING_SIZE);
    await frontend.setVringAddr(2, AREAS);
    await frontend.setVringKick(2, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject({ index: 2, inflight: undefined });
  });

  it("what GET_INFLIGHT_FD made is taken", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const region = await frontend.getInflightFd(4, RING_SIZE);
    if (region === undefined) throw new Error("no region");
    rig.own(region.fd);
    await frontend.setInflightFd(region);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.inflight?.offset).toBe(0n);
  });

  it("a second one takes the place of the first, whose fd is closed", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setInflightFd({ ...RECORD, fd: regionFd(rig) });
    const before = openFds();
    const second = regionFd(rig);
    await frontend.setInflightFd({ ...RECORD, fd: second });
    expect(openFds()).toBe(before + 1);
    await frontend.setVringKick(0, rig.eventfd());
    expect(inode(rig.device.lastVring.inflight?.fd as number)).toBe(inode(second));
  });

  it.each([
    ["BI-137: a region a byte too short", { mmapSize: RECORD.mmapSize - 1n }],
    ["BI-137: a region of nothing", { mmapSize: 0n }],
    ["BI-138: an offset inside a page", { mmapOffset: 64n }],
    ["BI-138: an offset that wraps", { mmapOffset: 2n ** 64n - 4096n }],
    ["BI-138: a size of 2^40", { mmapSize: 1n << 40n }],
    ["BI-138: a size that wraps", { mmapSize: 2n ** 64n - 1n }],
    ["BI-139: more queues than there are", { queues: 5, mmapSize: BigInt(5 * STRIDE) }],
    ["BI-134: no queues", { queues: 0 }],
    ["BI-134: queues without entries", { queueSize: 0 }],
    ["BI-134: queues of 65535 entries", { queueSize: 65535 }],
  ])("%s: refused", async (_name, record) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    expect(await ackOfRegion(frontend, record, [regionFd(rig)])).not.toBe(0n);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.inflight).toBeUndefined();
  });

  it("BI-138: a file shorter than the region is refused", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    expect(await ackOfRegion(frontend, {}, [regionFd(rig, 2 * STRIDE - 1)])).not.toBe(0n);
  });

  it("PROTOCOL, 17: a file that can be shortened under us, or not written, is refused", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const sealed = regionFd(rig);
    addSeals(sealed, 8);
    const files = [
      rig.own(openSync(join("/dev/shm", "."), "r")),
      rig.own(openSync("/dev/zero", "r+")),
      rig.own(openSync(`/proc/self/fd/${regionFd(rig)}`, "r")),
      sealed,
      rig.eventfd(),
    ];
    for (const fd of files) expect(await ackOfRegion(frontend, {}, [fd])).not.toBe(0n);
  });

  it("BI-141: 0 or 2 fds are refused and closed", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const fd = regionFd(rig);
    for (const fds of [[], [fd, fd]]) expect(await ackOfRegion(frontend, {}, fds)).not.toBe(0n);
  });

  it("while a ring is started it is refused", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setVringKick(0, rig.eventfd());
    expect(await ackOfRegion(frontend, {}, [regionFd(rig)])).not.toBe(0n);
    await frontend.getVringBase(0);
    expect(await ackOfRegion(frontend, {}, [regionFd(rig)])).toBe(0n);
  });

  it("a ring larger than the region's queues does not start", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    expect(await ackOfRegion(frontend, { queueSize: RING_SIZE / 2 }, [regionFd(rig)])).toBe(0n);
    await expect(frontend.setVringKick(0, rig.eventfd())).rejects.toThrow(/refused/);
  });

  it("rings that became packed ones after it need more room than it has: they do not start", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    rig.device.features |= 1n << BigInt(VIRTIO_F_RING_PACKED);
    expect(await ackOfRegion(frontend, {}, [regionFd(rig)])).toBe(0n);
    await frontend.setFeatures(VERSION_1 | BIT_30 | (1n << BigInt(VIRTIO_F_RING_PACKED)));
    await expect(frontend.setVringKick(0, rig.eventfd())).rejects.toThrow(/refused/);
  });

  it("without INFLIGHT_SHMFD both are refused", async () => {
    const { rig, frontend } = await ready(0, USUAL_PROTOCOL_FEATURES & ~(INFLIGHT | BASE_INFLIGHT | SKIP_DRAIN));
    await using _ = rig;
    expect(await ackOfRegion(frontend, {}, [regionFd(rig)])).not.toBe(0n);
    expect(await frontend.getInflightFd(4, RING_SIZE)).toBeUndefined();
  });
});
