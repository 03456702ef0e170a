/** What happens to interfaces, guests and their drivers while frames are on their way, with every way to the interface. */
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { expectDownload, expectEveryPing, expectNoComplaints, expectTcp, serveFile } from "./guest-traffic.ts";
import { hostEnd } from "./host-end.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks, Network } from "./network.ts";
import { Relay } from "./relay.ts";
import { Testpmd } from "./testpmd.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingForNetworks("linux.uml", "dpdk-testpmd", ...INITRAMFS_TOOLS);

const ways = [
  { method: "io_uring", poll: "adaptive" },
  { method: "io_uring", poll: "interrupt" },
  { method: "io_uring", poll: "busy" },
  { method: "aio", poll: "interrupt" },
  { method: "rw", poll: "adaptive" },
];

describe.skipIf(missing !== undefined)(`TAP interfaces in use${missing ? `: ${missing}` : ""}`, () => {
  describe.each(ways)("io=$method, --poll $poll", ({ method, poll }) => {
    let network: Network;
    let relay: Relay;
    let a: UmlGuest;
    let b: UmlGuest;

    beforeEach(async () => {
      network = await Network.make();
      await network.check(`ip link add br0 type bridge; ip addr add ${network.ip}/24 dev br0; ip link set br0 up`);
      relay = await Relay.start({
        links: (...sockets) => sockets.map((path, i) => `vhost-user:${path}=tap:vm${i},bridge=br0,io=${method}`),
        args: ["--poll", poll],
        wrap: network.inside,
      });
      [a, b] = await Promise.all([
        UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" }),
        UmlGuest.boot({ socket: relay.sockets[1], ip: "10.0.0.2" }),
      ]);
      for (const machine of [a, b, network]) await serveFile(machine, 8);
    });

    afterEach(async () => {
      for (const each of [a, b, relay, network]) await each?.[Symbol.asyncDispose]();
    });

    async function expectTraffic(): Promise<void> {
      for (const guest of [a, b]) {
        await expectEveryPing(network, guest, 1472);
        await expectDownload(guest, network);
        await expectDownload(network, guest);
      }
      await expectDownload(a, b);
    }

    test("the interface goes down and comes up again, under traffic", async () => {
      await a.check("iperf3 --server --daemon");
      for (const reverse of [[], ["--reverse"]]) {
        await using client = network.start("iperf3", ["iperf3", "-c", a.ip, "-t", "600", "--forceflush", ...reverse]);
        await client.until("a report", () => /bits\/sec/.test(client.output) || undefined);
        await network.check("ip link set vm0 down");
        await delay(300);
        await expectEveryPing(network, b, 56);
        await network.check("ip link set vm0 up");
        await expectEveryPing(network, a, 56);
      }
      await expectTraffic();
      expect(relay.log).not.toMatch(/trap|exception|unhandled|fatal/i);
    });

    test("a driver that takes nothing does not hold up the other guest; it goes on when it takes again", async () => {
      await a.kill();
      await using testpmd = await Testpmd.start({ sockets: [relay.sockets[0]], mergeable: true });
      // the interface is a port of the bridge: it gets what goes to everybody
      await network.check("ip neigh add 10.0.0.3 lladdr 02:00:0a:00:00:03 dev br0");
      await using flood = network.start("flood", hostEnd("flood", "10.0.0.3", 9, 50_000, 1000));
      await expectEveryPing(network, b, 1472);
      await expectDownload(b, network);
      await expectDownload(network, b);
      await flood.exited;
      const before = relay.cpuTicks;
      await delay(2000);
      if (poll !== "busy") expect(relay.cpuTicks - before).toBeLessThan(40);
      await testpmd.command("set fwd rxonly");
      await testpmd.command("start");
      await using second = network.start("flood", hostEnd("flood", "10.0.0.3", 9, 10_000, 1000));
      await second.exited;
      await testpmd.statsWhen("more than its virtqueue holds", ([port]) => port!.rxPackets > 5000);
      await testpmd.quit();
    });

    test("a guest's interface goes down and comes up again, under traffic", async () => {
      for (let time = 0; time < 3; time++) {
        await using flood = network.start("flood", hostEnd("flood", a.ip, 9, 1_000_000, 1000));
        await a.check("usleep 200000; ip link set eth0 down; usleep 200000; ip link set eth0 up");
        await flood.kill();
      }
      await expectTraffic();
      await expectNoComplaints(a);
    });

    test("larger frames than a guest has room for cost those only", async () => {
      await network.check("ip link set vm0 mtu 9000; ip link set vm1 mtu 9000; ip link set br0 mtu 9000");
      await network.run(`ping -q -c 20 -i 0.01 -s 8000 -w 2 ${a.ip}`);
      await expectEveryPing(network, a, 1472);
      await network.check("ip link set br0 mtu 1500");
      await expectTraffic();
    });

    test("the interface is deleted: the guest has no network, the other has, and the relay ends in order", async () => {
      await network.check("ip link del vm0");
      await delay(200);
      await expectEveryPing(network, b, 56);
      await a.run(`ping -c 3 -W 1 ${network.ip}`);
      await expectDownload(b, network);
      const before = relay.cpuTicks;
      await delay(2000);
      if (poll !== "busy") expect(relay.cpuTicks - before).toBeLessThan(40);
      expect(await relay.stop()).toMatchObject({ status: 0, signal: null });
      expect(relay.log).not.toMatch(/trap|exception|unhandled|fatal/i);
    });

    test("TCP in both directions at once", async () => {
      await a.check("iperf3 --server --daemon; iperf3 --server --daemon --port 5202");
      await Promise.all([
        expectTcp(network, a, "--time 3 --parallel 4"),
        expectTcp(network, a, "--time 3 --parallel 4 --reverse --port 5202"),
        expectDownload(b, network),
      ]);
      await expectTraffic();
    });
  });
});
