/** A QEMU guest with packed virtqueues on a TAP interface, and a relay that is killed under it: the short test. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { OFFLOAD_FEATURES } from "../../src/ports/offloads.ts";
import { expectNoComplaints } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks } from "./network.ts";
import { QemuOnTap } from "./qemu-tap.ts";

const missing = missingForNetworks("qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS);

describe.skipIf(missing !== undefined)(`QEMU on a TAP interface${missing ? `: ${missing}` : ""}`, () => {
  let machine: QemuOnTap;

  beforeAll(async () => {
    machine = await QemuOnTap.boot({ packed: true });
  });

  afterAll(() => machine?.[Symbol.asyncDispose]());

  test("the guest has packed virtqueues and every offload", async () => {
    for (const feature of [VIRTIO_F_RING_PACKED, ...OFFLOAD_FEATURES]) {
      expect(await machine.guest.hasFeature(feature)).toBe(true);
    }
  });

  test("every ping is answered, TCP runs, both ways", () => machine.expectTraffic());

  test("the relay killed and started again in the middle of a download: it comes to its end", () =>
    machine.expectToSurviveKills(1));

  test("the guest's kernel complains about nothing", () => expectNoComplaints(machine.guest));
});
