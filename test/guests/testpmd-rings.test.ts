/** DPDK's virtio_user with every kind of virtqueue, mixed on one link. */
import { describe, expect, test } from "vitest";
import { VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_NET_F_MRG_RXBUF } from "../../src/layout/virtio.ts";
import { Relay } from "./relay.ts";
import { expectNothingLost, forward, untilEveryQueueCarries } from "./testpmd-run.ts";
import { Testpmd } from "./testpmd.ts";
import { missingTools } from "./tools.ts";

const missing = missingTools("dpdk-testpmd");

const rings = [
  { name: "split", packed: [false, false] },
  { name: "packed", packed: [true, true] },
  { name: "split and packed", packed: [false, true] },
] as const;

describe.skipIf(missing !== undefined)(`DPDK testpmd, virtqueues${missing ? `: ${missing}` : ""}`, () => {
  describe.each(rings)("$name", ({ packed }) => {
    describe.each([{ inOrder: false }, { inOrder: true }])("in order: $inOrder", ({ inOrder }) => {
      test.each([
        { mergeable: true, queuePairs: 1 },
        { mergeable: false, queuePairs: 1 },
        { mergeable: true, queuePairs: 4 },
        { mergeable: false, queuePairs: 4 },
      ])("mergeable: $mergeable, $queuePairs queue pairs", async ({ mergeable, queuePairs }) => {
        await using relay = await Relay.start(`,queues=${queuePairs}`);
        const { sockets } = relay;
        await using testpmd = await Testpmd.start({
          sockets,
          mergeable,
          packed,
          inOrder,
          queuePairs,
          queueSize: 512,
        });
        expect(testpmd.features).toHaveLength(2);
        for (const [port, features] of testpmd.features.entries()) {
          const has = (number: number): boolean => ((features >> BigInt(number)) & 1n) === 1n;
          expect(has(VIRTIO_F_RING_PACKED)).toBe(packed[port]);
          expect(has(VIRTIO_F_IN_ORDER)).toBe(inOrder);
          expect(has(VIRTIO_NET_F_MRG_RXBUF)).toBe(mergeable);
        }
        await testpmd.command("set txpkts 1518");
        await untilEveryQueueCarries(testpmd, queuePairs);
        await forward(testpmd);
        await expectNothingLost(testpmd, relay);
        await testpmd.quit();
      });
    });
  });
});
