/** testpmd forwards back and forth through a relay, and counts: what the tests with DPDK have in common. */
import { expect } from "vitest";
import type { Counter, PortStats, Testpmd } from "./testpmd.ts";

const wanted = 200_000;

const total = (stats: readonly PortStats[], counter: Counter): number =>
  stats.reduce((sum, port) => sum + port[counter], 0);

/** Puts packets on the link and lets the ports hand them back and forth until 200,000 have arrived at each. */
export async function forward(testpmd: Testpmd): Promise<void> {
  await testpmd.command("start tx_first 8");
  await testpmd.statsWhen(`${wanted} packets at each port`, (ports) =>
    ports.every(({ rxPackets }) => rxPackets > wanted),
  );
  await testpmd.command("stop");
}

/** Takes what is still on the link off it; then each port must have received all that the other one sent. */
export async function expectNothingLost(testpmd: Testpmd): Promise<void> {
  await testpmd.command("set fwd rxonly");
  await testpmd.command("start");
  const ports = await testpmd.statsWhen(
    "every sent packet arrive",
    (now) => total(now, "rxPackets") >= total(now, "txPackets"),
  );
  await testpmd.command("stop");
  expect(ports.map(({ rxPackets }) => rxPackets)).toEqual(ports.map(({ txPackets }) => txPackets).toReversed());
  for (const counter of ["rxErrors", "rxNombuf", "txErrors"] as const) expect(total(ports, counter)).toBe(0);
}
