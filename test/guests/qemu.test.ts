/**
 * A guest with split virtqueues and offloads, one with packed ones and none, and a relay that is killed under them: the
 * short QEMU test.
 */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { OFFLOAD_FEATURES } from "../../src/ports/offloads.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { QemuPair } from "./qemu-pair.ts";
import { missingTools } from "./tools.ts";

const missing = missingTools("qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS);

describe.skipIf(missing !== undefined)(`QEMU, split and packed${missing ? `: ${missing}` : ""}`, () => {
  let pair: QemuPair;

  beforeAll(async () => {
    pair = await QemuPair.boot({ packed: false }, { packed: true, noOffloads: true });
  });

  afterAll(() => pair?.[Symbol.asyncDispose]());

  test("one guest has packed virtqueues, the other has not", async () => {
    expect(await pair.a.hasFeature(VIRTIO_F_RING_PACKED)).toBe(false);
    expect(await pair.b.hasFeature(VIRTIO_F_RING_PACKED)).toBe(true);
  });

  test("one guest leaves large segments to the device, the other takes none", async () => {
    for (const feature of OFFLOAD_FEATURES) expect(await pair.a.hasFeature(feature)).toBe(true);
    for (const feature of OFFLOAD_FEATURES) expect(await pair.b.hasFeature(feature)).toBe(false);
  });

  test("every ping is answered, TCP runs, both ways", () => pair.expectTraffic());

  test("the relay killed and started again in the middle of a download: it comes to its end", () =>
    pair.expectToSurviveKills());

  test("the guests' kernels complain about nothing", () => pair.expectNoComplaints());
});
