/**
 * A Linux guest, `vhost-relay run --link vhost-user:PATH=tap:vm0`, and the host's network stack behind the TAP interface.
 *
 * The tests of this file go through the life of one relay in the order they are written in.
 */
import { existsSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Capture } from "./capture.ts";
import { expectDownload, expectEveryPing, expectTcp, expectUdp, serveFile } from "./guest-traffic.ts";
import { hostEnd } from "./host-end.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks, Network } from "./network.ts";
import { Relay } from "./relay.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingForNetworks("linux.uml", "tcpdump", ...INITRAMFS_TOOLS);

/** CPU time is counted in ticks, of which there are 100 a second. */
const TICKS = 100;
const fromGuest = "--reverse";

describe.skipIf(missing !== undefined)(`a Linux guest on a TAP interface${missing ? `: ${missing}` : ""}`, () => {
  let network: Network;
  let relay: Relay;
  let guest: UmlGuest;

  const boot = () => UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" });

  /** Everything that a guest needs to be there for the tests below. */
  async function serve(): Promise<void> {
    await guest.check("iperf3 --server --daemon");
    await serveFile(guest, 8);
    await guest.check("head -c 3000 /dev/urandom >/srv/small");
  }

  /** Datagrams of mixed sizes, whose bytes are compared: dd reads one and writes one at a time. */
  async function expectEchoes(count: number): Promise<void> {
    const program = network.start("echo", hostEnd("echo", 7, count));
    await program.until("its socket", () => program.output.includes("listening") || undefined);
    await guest.check(`
      bash -c 'exec 3<>/dev/udp/${network.ip}/7; echo >&3; exec dd bs=65536 <&3 >&3' >/dev/null 2>&1 &`);
    expect((await program.exited).status, program.output).toBe(0);
    console.log(program.output.trim().split("\n").at(-1));
  }

  async function expectNoBadChecksums(): Promise<void> {
    for (const machine of [guest, network]) {
      // a line of names, a line of values
      const [names, values] = (await machine.check("grep ^Udp: /proc/net/snmp"))
        .split("\n")
        .map((line) => line.split(" "));
      expect(values?.[names?.indexOf("InCsumErrors") ?? -1]).toBe("0");
      const tcp = (await machine.check("grep ^Tcp: /proc/net/snmp")).split("\n").map((line) => line.split(" "));
      expect(tcp[1]?.[tcp[0]?.indexOf("InCsumErrors") ?? -1]).toBe("0");
    }
  }

  beforeAll(async () => {
    network = await Network.make();
    await network.check(`
      ip tuntap add dev vm0 mode tap multi_queue vnet_hdr
      ip addr add ${network.ip}/24 dev vm0
      ip link set vm0 up`);
    await serveFile(network, 8);
    relay = await Relay.toTap("tap:vm0", network);
    guest = await boot();
    await serve();
  });

  afterAll(async () => {
    await guest?.kill();
    await relay?.[Symbol.asyncDispose]();
    await network?.[Symbol.asyncDispose]();
  });

  // 1472 fills an Ethernet frame; the others go as fragments
  test.each([0, 56, 1000, 1472, 8000, 65_000])("every ping with %i bytes is answered", async (payloadBytes) => {
    await expectEveryPing(guest, network, payloadBytes);
    await expectEveryPing(network, guest, payloadBytes);
  });

  test("tcpdump sees what the guest sends, and finds nothing wrong in it", async () => {
    await using capture = await Capture.start(network, "vm0", "icmp or arp");
    await network.check("ip neigh flush dev vm0");
    await expectEveryPing(network, guest, 1472);
    await expectEveryPing(guest, network, 100);
    // it may miss some when the machine is busy
    await capture.until(50, "10.0.0.1 > 10.0.0.254: ICMP echo reply");
    await capture.until(1, "is-at 02:00:0a:00:00:01");
    expect(capture.wrong).toEqual([]);
  });

  test("TCP runs both ways, and every byte is right", async () => {
    for (const direction of ["", fromGuest]) {
      const rate = await expectTcp(network, guest, direction, "--time 1");
      console.log(`TCP ${direction === fromGuest ? "from" : "to"} the guest: ${rate} Mbit/s`);
    }
    await expectDownload(guest, network);
    await expectDownload(network, guest);
  });

  test("UDP runs both ways; datagrams of all sizes come back as they were", async () => {
    for (const direction of ["", fromGuest]) await expectUdp(network, guest, direction, "--time 1");
    await expectEchoes(300);
    await expectNoBadChecksums();
  });

  test("without offloads, checksums on the TAP interface are complete and right", async () => {
    await guest.check("ethtool -K eth0 tx off");
    await using capture = await Capture.start(network, "vm0", `src ${guest.ip} and (udp or tcp)`);
    await expectEchoes(20);
    await network.check("wget -q -O /dev/null http://10.0.0.1/small");
    await capture.until(1, "udp sum ok");
    await capture.until(3, "(correct)");
    expect(capture.wrong).toEqual([]);
    await expectDownload(guest, network);
    await expectDownload(network, guest);
    await guest.check("ethtool -K eth0 tx on");
    await expectNoBadChecksums();
  });

  test("1,000 short TCP connections from the guest, 100 to it", async () => {
    const program = network.start("server", hostEnd("serve", 8, 1000));
    await program.until("its socket", () => program.output.includes("listening") || undefined);
    // without a process for each connection, which is what takes a guest its time
    await guest.check(`bash -ec '
      for ((i = 0; i < 1000; i++)); do
        exec 3<>/dev/tcp/${network.ip}/8
        read -r line <&3
        echo "$line" >&3
        exec 3>&-
      done'`);
    expect((await program.exited).status, program.output).toBe(0);
    const digest = (await guest.check("sha256sum </srv/small")).split(" ")[0]!;
    await network.execute(hostEnd("get", `http://${guest.ip}/small`, 100, digest));
  });

  test("IPv6: link-local and static addresses, pings and TCP", async () => {
    await guest.load("ipv6");
    await guest.check("killall httpd; httpd -h /srv"); // it listened to IPv4 only
    await network.check("ip addr add fd00::254/64 dev vm0 nodad");
    await guest.check(`
      ip addr add fd00::1/64 dev eth0
      while ip addr show dev eth0 | grep -q tentative; do usleep 50000; done`);
    const linkLocal = async (machine: Network | UmlGuest, name: string): Promise<string> =>
      `${/inet6 (fe80::[\da-f:]+)/.exec(await machine.check(`ip addr show dev ${name}`))?.[1]}`;
    const ofGuest = await linkLocal(guest, "eth0");
    const ofNetwork = await linkLocal(network, "vm0");
    for (const bytes of [56, 1452, 8000]) {
      await expectEveryPing(network, { ip: "fd00::1" }, bytes);
      await expectEveryPing(guest, { ip: "fd00::254" }, bytes);
      await expectEveryPing(network, { ip: `${ofGuest}%vm0` }, bytes);
      await expectEveryPing(guest, { ip: `${ofNetwork}%eth0` }, bytes);
    }
    const digest = (await guest.check("cat /srv/data.sum")).split(" ")[0]!;
    console.log(await network.execute(hostEnd("get", "http://[fd00::1]/data", 8, digest)));
    expect(await guest.check("wget -q -O - http://[fd00::254]/data | sha256sum")).toBe(
      await network.check("cat /srv/data.sum"),
    );
  });

  test("frames of 9000 bytes pass in one piece", async () => {
    await guest.check("ip link set eth0 mtu 9000");
    await network.check("ip link set vm0 mtu 9000");
    const before = await network.count("vm0", "rx_packets");
    await expectEveryPing(network, guest, 8972);
    await expectEveryPing(guest, network, 8972);
    // fragments would be seven times as many; a few of other kinds may be among them
    expect((await network.count("vm0", "rx_packets")) - before).toBeLessThan(200);
    await expectDownload(guest, network);
    await expectDownload(network, guest);
    await guest.check("ip link set eth0 mtu 1500");
    await network.check("ip link set vm0 mtu 1500");
  });

  test("with nothing to do, the relay takes next to no CPU time", async () => {
    const seconds = 3;
    const before = relay.cpuTicks;
    await delay(seconds * 1000);
    const taken = relay.cpuTicks - before;
    console.log(`${taken} ticks of CPU time in ${seconds} s`);
    expect(taken).toBeLessThan(0.2 * seconds * TICKS);
  });

  test("a guest killed in the middle of traffic comes back on the same interface", async () => {
    await using client = network.start("iperf3", ["iperf3", "--client", guest.ip, "--time", "600", "--forceflush"]);
    await using server = network.start("iperf3", ["iperf3", "--server", "--one-off", "--forceflush"]);
    await server.until("its socket", () => (server.output.includes("listening") ? true : undefined));
    await guest.check(`iperf3 --client ${network.ip} --time 600 >/dev/null 2>&1 &`);
    await client.until("its first report", () => (/bits\/sec/.test(client.output) ? true : undefined));
    await guest.kill();
    guest = await boot();
    await serve();
    await expectEveryPing(network, guest, 1472);
    await expectEveryPing(guest, network, 1472);
    await expectDownload(guest, network);
    await expectDownload(network, guest);
  });

  test("a guest that shuts down in order comes back on the same interface", async () => {
    await guest.shutdown();
    guest = await boot();
    await expectEveryPing(network, guest, 1472);
    await expectDownload(network, guest);
  });

  test("SIGTERM ends the relay with status 0 and no error logged; the interface that was there before stays", async () => {
    expect(await network.check("cat /sys/class/net/vm0/carrier")).toBe("1\n");
    const { status, signal } = await relay.stop();
    expect({ status, signal }).toEqual({ status: 0, signal: null });
    expect(relay.sockets.filter((path) => existsSync(path))).toEqual([]);
    expect(relay.log).not.toMatch(/error|exception|unhandled|fatal/i);
    expect(await network.check("cat /sys/class/net/vm0/carrier")).toBe("0\n");
  });
});
