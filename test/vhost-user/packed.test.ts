/** What a session does otherwise once VIRTIO_F_RING_PACKED was acknowledged. */
import { describe, expect, it } from "vitest";
import * as L from "../../src/layout/vhost-user.ts";
import { VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { encodeVringAddress, encodeVringState } from "../../src/vhost-user/codec.ts";
import { encodePackedBase, makePosition } from "../../src/vhost-user/position.ts";
import {
  ackOf,
  AREAS,
  BIT_30,
  expectDropped,
  GPA,
  GPA_AREAS,
  MEMORY_SIZE,
  Rig,
  USER_ADDRESS,
  USUAL_PROTOCOL_FEATURES,
  VERSION_1,
} from "./rig.ts";

const PACKED = 1n << BigInt(VIRTIO_F_RING_PACKED);

/** A front-end whose driver acknowledged packed rings, with memory. */
async function packed() {
  const rig = new Rig();
  rig.device.features |= PACKED;
  rig.serve();
  const frontend = rig.connect();
  await frontend.setProtocolFeatures(USUAL_PROTOCOL_FEATURES);
  await frontend.setFeatures(VERSION_1 | PACKED | BIT_30);
  await frontend.setMemTable([rig.region()]);
  return { rig, frontend };
}

describe("VIRTIO_F_RING_PACKED", () => {
  it.each([1, 3, 300, 32767, 32768])("BI-106: a packed ring may have %i entries", async (size) => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setVringNum(0, size);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject({ size, base: 0x8000, ...GPA_AREAS });
  });

  it.each([0, 32769, 0x10100, 0xffffffff])("BI-102: a packed ring of %i entries is refused", async (num) => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_NUM, encodeVringState({ index: 0, num }))).not.toBe(0n);
  });

  it("BI-109: desc may end where memory ends, and the event structures have 4 bytes each", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    const end = USER_ADDRESS + BigInt(MEMORY_SIZE);
    await frontend.setVringNum(0, 10);
    await frontend.setVringAddr(0, { desc: end - 160n, avail: end - 4n, used: end - 8n });
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject({ desc: GPA + BigInt(MEMORY_SIZE) - 160n });
    await expect(frontend.setVringAddr(1, { ...AREAS, desc: end - 144n })).resolves.toBeUndefined();
    await expect(frontend.setVringNum(1, 10)).resolves.toBeUndefined();
    await frontend.setVringNum(2, 10);
    await expect(frontend.setVringAddr(2, { ...AREAS, desc: end - 144n })).rejects.toThrow(/refused/);
  });

  it.each([
    ["desc", 8n],
    ["avail", 2n],
    ["used", 2n],
  ] as const)("BI-108: the %s area at a multiple of %i is refused", async (area, step) => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    const address = encodeVringAddress({ index: 0, flags: 0, log: 0n, ...AREAS, [area]: AREAS[area] + step });
    expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_ADDR, address)).not.toBe(0n);
  });

  it("GET_VRING_BASE answers both positions, the same: nothing is held between them", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setVringNum(0, 300);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    rig.device.stopIndex = makePosition(299, 1);
    expect(await frontend.getVringBase(0)).toBe(encodePackedBase(makePosition(299, 1)));
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.base).toBe(makePosition(299, 1));
  });

  it("a ring that never started answers where it would begin", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    expect(await frontend.getVringBase(0)).toBe(0x8000_8000);
  });

  it.each([
    ["equal halves", 0x0007_0007, 0x0007],
    ["buffers taken and not used are taken again", 0x8005_0002, 0x8005],
    ["no used half, as DPDK answers", 0x0000_8007, 0x8007],
  ])("SET_VRING_BASE: %s", async (_name, num, base) => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setVringBase(0, num);
    await frontend.setVringNum(0, 8);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.base).toBe(base);
  });

  it("a base at a slot that the ring does not have is refused, at the latest when the ring starts", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setVringNum(0, 8);
    await expect(frontend.setVringBase(0, 0x8008_8008)).rejects.toThrow(/refused/);
    await frontend.setVringBase(0, 0x8007_8007);
    await frontend.setVringNum(0, 7);
    await frontend.setVringAddr(0, AREAS);
    await expect(frontend.setVringKick(0, rig.eventfd())).rejects.toThrow(/refused/);
    await frontend.setVringNum(0, 8);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual(["setFeatures", "setMemory", "startVring"]);
  });

  it("a size that only a packed ring may have is refused again when the ring starts as a split one", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setVringNum(0, 300);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await expect(frontend.setVringKick(0, rig.eventfd())).rejects.toThrow(/refused/);
    expect(rig.device.takeNames()).not.toContain("startVring");
  });

  it("BI-118: without it a base of 32 bits is refused", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await expect(frontend.setVringBase(0, 0x8000_8000)).rejects.toThrow(/refused/);
  });

  it("BI-038: without VIRTIO_F_VERSION_1 it is refused: the net header's length would be anybody's guess", async () => {
    const { rig, frontend } = await packed();
    await using _ = rig;
    await expect(frontend.setFeatures(PACKED | BIT_30)).rejects.toThrow(/refused/);
  });

  it("it is offered by the device, or refused as any other feature", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    await frontend.setFeatures(VERSION_1 | PACKED | BIT_30);
    await expectDropped(frontend);
  });
});
