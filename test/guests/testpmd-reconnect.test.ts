/** The relay dials DPDK's virtio_user ports, and is killed and started again while they forward. */
import { describe, expect, test } from "vitest";
import { Relay } from "./relay.ts";
import { Testpmd } from "./testpmd.ts";
import { missingTools } from "./tools.ts";

const missing = missingTools("dpdk-testpmd");

describe.skipIf(missing !== undefined)(`DPDK testpmd listens${missing ? `: ${missing}` : ""}`, () => {
  test.each([
    { name: "split", packed: [false, false] },
    { name: "packed", packed: [true, true] },
  ] as const)("$name virtqueues: a relay that was killed is replaced, the ports go on", async ({ packed }) => {
    await using relay = await Relay.start(",connect");
    await using testpmd = await Testpmd.start({ sockets: relay.sockets, mergeable: true, packed, listen: true });
    await testpmd.command("set fwd flowgen");
    await testpmd.command("start");
    for (let life = 0; life < 3; life++) {
      if (life > 0) {
        await relay.kill();
        await relay.restart();
      }
      const before = await testpmd.stats();
      const now = await testpmd.statsWhen("each port receive more", (ports) =>
        ports.every(({ rxPackets }, port) => rxPackets > before[port]!.rxPackets + 50_000),
      );
      for (const { rxErrors } of now) expect(rxErrors).toBe(0);
      expect(relay.log).not.toMatch(/refused|stopped/);
    }
    await testpmd.command("stop");
    await testpmd.quit();
  });
});
