/** Machines that QEMU makes, a pair for each test: what is not in the short test because each takes a minute or so. */
import { afterEach, describe, expect, test } from "vitest";
import { VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MQ } from "../../src/layout/virtio.ts";
import { pingFromEveryCpu } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { QemuPair } from "./qemu-pair.ts";
import type { GuestSettings } from "./qemu-pair.ts";
import { missingTools } from "./tools.ts";

const missing = missingTools("qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS);

describe.skipIf(missing !== undefined)(`two QEMU guests${missing ? `: ${missing}` : ""}`, () => {
  let pair: QemuPair | undefined;

  async function boot(settings: GuestSettings): Promise<QemuPair> {
    pair = await QemuPair.boot(settings);
    for (const guest of [pair.a, pair.b]) {
      expect(await guest.hasFeature(VIRTIO_F_RING_PACKED)).toBe(settings.packed ?? false);
    }
    return pair;
  }

  afterEach(async () => {
    await pair?.[Symbol.asyncDispose]();
    pair = undefined;
  });

  describe.each([{ packed: false }, { packed: true }])("packed virtqueues: $packed", (ring) => {
    test("the relay is killed and started again under a download: it comes to its end", async () => {
      const machines = await boot(ring);
      await machines.expectTraffic();
      await machines.expectToSurviveKills();
      await machines.expectTraffic();
      await machines.expectNoComplaints();
    });

    test("QEMU listens, the relay dials, and is killed and started again", async () => {
      const machines = await boot({ ...ring, listen: true });
      await machines.expectTraffic();
      await machines.expectToSurviveKills();
      await machines.expectNoComplaints();
    });

    test("guests of 6 GiB", async () => {
      const machines = await boot({ ...ring, memoryMiB: 6144 });
      await machines.expectTraffic();
      await machines.expectNoComplaints();
    });

    test("four queue pairs: all of them carry frames, fewer and more of them, and a relay killed", async () => {
      const machines = await boot({ ...ring, queuePairs: 4 });
      const { a, b, relay } = machines;
      expect(await a.hasFeature(VIRTIO_NET_F_MQ)).toBe(true);
      await machines.expectTraffic();
      await pingFromEveryCpu(a, b);
      await pingFromEveryCpu(b, a);
      const { lanes } = await relay.link();
      expect(lanes).toHaveLength(8);
      expect(lanes.filter(({ packets }) => packets < 20)).toEqual([]);
      for (const queues of [2, 1, 4]) {
        for (const guest of [a, b]) await guest.check(`ethtool -L eth0 combined ${queues}`);
        await pingFromEveryCpu(a, b);
        await pingFromEveryCpu(b, a);
      }
      await machines.expectToSurviveKills();
      await a.check("ethtool -L eth0 combined 2");
      await pingFromEveryCpu(a, b);
      await pingFromEveryCpu(b, a); // what b sends on its last two pairs arrives too
      await machines.expectNoComplaints();
    });

    test("memory is plugged in under a download: nothing is lost", async () => {
      const machines = await boot({ ...ring, memoryMaxMiB: 2048 });
      expect(await machines.expectToGoOn(2, () => machines.a.plugMemory(256))).toEqual([]);
      // what is used from now on is in part the new memory
      await machines.a.check(
        "mkdir /fill && mount -t tmpfs -o size=400m fill /fill && head -c 350m /dev/zero >/fill/fill",
      );
      await machines.expectTraffic();
      await machines.expectNoComplaints();
    });
  });

  test("legacy devices, without VIRTIO_F_VERSION_1", async () => {
    const machines = await boot({ legacy: true });
    expect(await machines.a.hasFeature(VIRTIO_F_VERSION_1)).toBe(false);
    await machines.expectTraffic();
    await machines.expectToSurviveKills();
    await machines.expectNoComplaints();
  });
});
