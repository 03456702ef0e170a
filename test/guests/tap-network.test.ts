/**
 * Two Linux guests, each on a TAP interface of its own, in one bridge, with a neighbour behind a veth pair whose ends leave
 * no checksum unfinished: what frames look like on a wire.
 */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Capture } from "./capture.ts";
import { expectDownload, expectEveryPing, serveFile } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks, Network } from "./network.ts";
import { Relay } from "./relay.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingForNetworks("linux.uml", "tcpdump", ...INITRAMFS_TOOLS);

describe.skipIf(missing !== undefined)(`two Linux guests in a bridge${missing ? `: ${missing}` : ""}`, () => {
  let network: Network;
  let neighbour: Network;
  let relay: Relay;
  let a: UmlGuest;
  let b: UmlGuest;

  beforeAll(async () => {
    network = await Network.make();
    neighbour = await Network.make("10.0.0.253");
    await network.check(`
      ip link add br0 type bridge
      ip link set br0 up
      ip tuntap add dev vm0 mode tap multi_queue vnet_hdr
      ip link set vm0 master br0 up
      ip link add port type veth peer name eth0 netns ${neighbour.pid}
      ethtool -K port tx off >/dev/null
      ip link set port master br0 up`);
    await neighbour.check(`
      ethtool -K eth0 tx off >/dev/null
      ip addr add ${neighbour.ip}/24 dev eth0
      ip link set eth0 up`);
    relay = await Relay.start({
      // one interface that was there before, one that the relay makes and puts into the bridge
      links: (first, second) => [`vhost-user:${first}=tap:vm0`, `vhost-user:${second}=tap:new,bridge=br0`],
      wrap: network.inside,
    });
    [a, b] = await Promise.all([
      UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" }),
      UmlGuest.boot({ socket: relay.sockets[1], ip: "10.0.0.2" }),
    ]);
    for (const machine of [a, b, neighbour]) await serveFile(machine, 8);
  });

  afterAll(async () => {
    for (const each of [a, b, relay, network, neighbour]) await each?.[Symbol.asyncDispose]();
  });

  test("every ping is answered, TCP runs: between the guests, and between them and the neighbour", async () => {
    for (const [from, to] of [
      [a, b],
      [b, a],
      [a, neighbour],
      [neighbour, b],
    ] as const) {
      for (const bytes of [56, 1472, 8000]) await expectEveryPing(from, to, bytes);
      await expectDownload(from, to);
    }
  });

  test("tcpdump at the neighbour's finds every checksum right", async () => {
    await using capture = await Capture.start(neighbour, "eth0", "tcp or udp or icmp or arp");
    await a.check(`bash -c 'for i in 1 2 3; do echo $i >/dev/udp/${neighbour.ip}/9; done'`);
    await a.check("head -c 20000 /dev/urandom >/srv/short");
    await neighbour.check(`wget -q -O /dev/null http://${a.ip}/short`);
    await capture.until(3, `${a.ip}`);
    await capture.until(3, "udp sum ok");
    await capture.until(10, "(correct)");
    expect(capture.wrong).toEqual([]);
  });

  test("802.1Q: what the guests tag arrives tagged, and with every byte", async () => {
    for (const guest of [a, b]) {
      await guest.load("8021q");
      await guest.check(`
        ip link add link eth0 name vlan5 type vlan id 5
        ip addr add ${guest.ip.replace("10.0", "10.5")}/24 dev vlan5
        ip link set vlan5 up`);
    }
    await using capture = await Capture.start(network, "vm0", "vlan and icmp");
    for (const bytes of [56, 1472, 8000]) await expectEveryPing(a, { ip: "10.5.0.2" }, bytes);
    await capture.until(20, "vlan 5");
    expect(capture.wrong).toEqual([]);
    expect(await b.check("wget -q -O - http://10.5.0.1/data | sha256sum")).toBe(await a.check("cat /srv/data.sum"));
    expect(await a.check("wget -q -O - http://10.5.0.2/data | sha256sum")).toBe(await b.check("cat /srv/data.sum"));
  });

  test("SIGTERM: the interface that the relay made goes, the other stays", async () => {
    const taps = async (): Promise<string[]> =>
      (await network.check("ip -o link show type tun")).match(/(?<=^\d+: )\w+/gm) ?? [];
    expect(await taps()).toEqual(["vm0", expect.stringMatching(/^tap\d+$/)]);
    expect(await relay.stop()).toMatchObject({ status: 0, signal: null });
    expect(await taps()).toEqual(["vm0"]);
    expect(relay.log).not.toMatch(/error|exception|unhandled|fatal/i);
  });
});
