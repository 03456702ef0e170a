/** DPDK's virtio_user on a TAP interface: a polling driver that sends, or takes, more than the kernel's side can do. */
import { setTimeout as delay } from "node:timers/promises";
import { describe, expect, test } from "vitest";
import { hostEnd } from "./host-end.ts";
import { missingForNetworks, Network } from "./network.ts";
import { Relay } from "./relay.ts";
import { Testpmd } from "./testpmd.ts";

/** Of Ethernet, IPv4 and UDP. */
const HEADERS = 42;

const missing = missingForNetworks("dpdk-testpmd");

describe.skipIf(missing !== undefined)(`DPDK testpmd on a TAP interface${missing ? `: ${missing}` : ""}`, () => {
  async function makeNetwork(): Promise<Network> {
    const network = await Network.make();
    await network.check(`
      sysctl -qw net.ipv6.conf.all.disable_ipv6=1
      ip tuntap add dev vm0 mode tap multi_queue vnet_hdr
      ip addr add ${network.ip}/24 dev vm0
      ip neigh add 10.0.0.1 lladdr 02:00:0a:00:00:01 dev vm0
      ip link set vm0 up`);
    return network;
  }

  /** Frames that the relay says it dropped on the way from the driver, or to it. */
  async function drops(relay: Relay, way: "from" | "to"): Promise<Record<string, number>> {
    const lane = (await relay.link()).lanes.find((each) => each[way].includes("vhost-user"))!;
    return Object.fromEntries(Object.entries(lane.drops).filter(([, frames]) => frames > 0));
  }

  const total = (counts: Record<string, number>): number => Object.values(counts).reduce((a, b) => a + b, 0);

  test.each([
    { packed: false, mergeable: true, bytes: 64 },
    { packed: true, mergeable: false, bytes: 1514 },
  ])("packed: $packed, mergeable: $mergeable, frames of $bytes bytes", async ({ packed, mergeable, bytes }) => {
    await using network = await makeNetwork();
    await using relay = await Relay.toTap("tap:vm0", network);
    const sockets = [relay.sockets[0]];
    await using testpmd = await Testpmd.start({ sockets, packed: [packed, packed], mergeable });

    // all that the driver sends comes out
    await testpmd.command(`set txpkts ${bytes}`);
    await testpmd.command("set fwd txonly");
    await testpmd.command("start");
    await testpmd.statsWhen("200,000 frames leave", ([port]) => port!.txPackets > 200_000);
    await testpmd.command("stop");
    const [{ txPackets } = { txPackets: 0 }] = await testpmd.stats();
    const cameOut = async (): Promise<number> =>
      (await network.count("vm0", "rx_packets")) + total(await drops(relay, "from"));
    for (let left = 100; left > 0 && (await cameOut()) < txPackets; left--) await delay(50);
    expect(await cameOut()).toBe(txPackets);
    // what was sent before the driver enabled its queues
    expect(Object.keys(await drops(relay, "from")).filter((reason) => reason !== "disabled")).toEqual([]);
    expect(await network.count("vm0", "rx_errors")).toBe(0);

    // all that the interface's queue has room for goes in
    await testpmd.command("set fwd rxonly");
    await testpmd.command("start");
    await network.execute(hostEnd("flood", "10.0.0.1", 9, 100_000, bytes - HEADERS));
    const given = async (): Promise<number> =>
      (await network.count("vm0", "tx_packets")) - total(await drops(relay, "to"));
    const received = async (): Promise<number> => (await testpmd.stats())[0]!.rxPackets;
    for (let left = 100; left > 0 && (await received()) < (await given()); left--) await delay(50);
    const [port] = await testpmd.stats();
    console.log(`the host sent 100000, ${port!.rxPackets} arrived`);
    expect(port!.rxPackets).toBe(await given());
    expect(port!.rxPackets).toBeGreaterThan(10_000);
    expect(port!.rxErrors + port!.rxNombuf).toBe(0);
    await testpmd.quit();
  });
});
