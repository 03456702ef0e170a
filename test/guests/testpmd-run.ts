/** testpmd forwards back and forth through a relay, and counts: what the tests with DPDK have in common. */
import { expect } from "vitest";
import type { Relay } from "./relay.ts";
import type { Counter, PortStats, Testpmd } from "./testpmd.ts";

const wanted = 200_000;

const total = (stats: readonly PortStats[], counter: Counter): number =>
  stats.reduce((sum, port) => sum + port[counter], 0);

/**
 * Sends until every queue of both ports has received something. virtio_user does not wait for its queues to be enabled:
 * what it sends before, the back-end has to drop (docs/PROTOCOL.md, 5).
 */
export async function untilEveryQueueCarries(testpmd: Testpmd, queuePairs: number): Promise<void> {
  for (const port of [0, 1]) {
    for (;;) {
      const received = await testpmd.queueStats(port);
      expect(received).toHaveLength(queuePairs);
      if (received.every((packets) => packets > 0)) break;
      await testpmd.command("start tx_first 1");
      await testpmd.command("stop");
    }
  }
}

/** Puts packets on the link and lets the ports hand them back and forth until 200,000 have arrived at each. */
export async function forward(testpmd: Testpmd): Promise<void> {
  await testpmd.command("start tx_first 8");
  await testpmd.statsWhen(`${wanted} packets at each port`, (ports) =>
    ports.every(({ rxPackets }) => rxPackets > wanted),
  );
  await testpmd.command("stop");
}

/** Takes what is still on the link off it; then each port must have received all that the other one sent to it. */
export async function expectNothingLost(testpmd: Testpmd, relay: Relay): Promise<void> {
  await testpmd.command("set fwd rxonly");
  await testpmd.command("start");
  const dropped = await Promise.all(relay.sockets.map((path) => droppedFrom(relay, path)));
  const lost = dropped.reduce((sum, packets) => sum + packets, 0);
  const ports = await testpmd.statsWhen(
    "every sent packet arrive",
    (now) => total(now, "rxPackets") + lost >= total(now, "txPackets"),
  );
  await testpmd.command("stop");
  const sent = ports.map(({ txPackets }, port) => txPackets - dropped[port]!);
  expect(ports.map(({ rxPackets }) => rxPackets)).toEqual(sent.toReversed());
  for (const counter of ["rxErrors", "rxNombuf", "txErrors"] as const) expect(total(ports, counter)).toBe(0);
}

/** Frames from this port that were sent too early; none may be dropped for another reason. */
async function droppedFrom(relay: Relay, path: string): Promise<number> {
  const lanes = (await relay.link()).lanes.filter(({ from }) => from.includes(path));
  const reasons = lanes.flatMap(({ drops }) => Object.entries(drops).filter(([, packets]) => packets > 0));
  expect(reasons.filter(([reason]) => reason !== "disabled")).toEqual([]);
  return lanes.reduce((sum, { drops }) => sum + drops.disabled, 0);
}
