/**
 * Two unmodified Linux guests talk through `vhost-relay run`, and one of them dies and comes back.
 *
 * The tests of this file go through the life of one relay in the order they are written in.
 */
import { existsSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { expectEveryPing, expectTcp, expectUdp } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { Relay } from "./relay.ts";
import { missingTools } from "./tools.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingTools("linux.uml", ...INITRAMFS_TOOLS);

/** iperf3's option for the direction of traffic; its client runs on the second guest. */
const toFirst = "";
const fromFirst = "--reverse";
type Direction = typeof toFirst | typeof fromFirst;

describe.skipIf(missing !== undefined)(`two Linux guests, one link${missing ? `: ${missing}` : ""}`, () => {
  let relay: Relay;
  let a: UmlGuest;
  let b: UmlGuest;

  const bootA = () => UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" });
  const bootB = () => UmlGuest.boot({ socket: relay.sockets[1], ip: "10.0.0.2" });

  async function expectTcpOf(direction: Direction): Promise<void> {
    const rate = await expectTcp(b, a, direction);
    console.log(`TCP ${direction === toFirst ? "to" : "from"} the first guest: ${rate} Mbit/s`);
  }

  beforeAll(async () => {
    relay = await Relay.start();
    [a, b] = await Promise.all([bootA(), bootB()]);
    await a.check("iperf3 --server --daemon");
  });

  afterAll(async () => {
    await a?.kill();
    await b?.kill();
    await relay?.[Symbol.asyncDispose]();
  });

  // 1472 fills an Ethernet frame; 8000 goes as six fragments
  test.each([0, 56, 1000, 1472, 8000])("every ping with %i bytes is answered", async (payloadBytes) => {
    await expectEveryPing(a, b, payloadBytes);
    await expectEveryPing(b, a, payloadBytes);
  });

  test("TCP runs from the second guest to the first", () => expectTcpOf(toFirst));

  test("TCP runs from the first guest to the second", () => expectTcpOf(fromFirst));

  test("UDP datagrams arrive both ways", async () => {
    for (const direction of [toFirst, fromFirst]) await expectUdp(b, a, direction);
  });

  test("frames of 9000 bytes pass in one piece", async () => {
    const received = "cat /sys/class/net/eth0/statistics/rx_packets";
    for (const guest of [a, b]) await guest.check("ip link set eth0 mtu 9000");
    const before = Number(await a.check(received));
    await expectEveryPing(b, a, 8972);
    // fragments would be seven times as many; a few ARP packets may be among them
    expect(Number(await a.check(received)) - before).toBeLessThan(100);
    await expectTcpOf(toFirst);
    for (const guest of [a, b]) await guest.check("ip link set eth0 mtu 1500");
  });

  test("a guest killed in the middle of traffic comes back on the same relay", async () => {
    await b.check(`iperf3 --client ${a.ip} --time 600 >/dev/null 2>&1 &`);
    await expectEveryPing(b, a, 56);
    await b.check("pidof iperf3");
    await a.kill();
    a = await bootA();
    // the new kernel resets the connection that it does not know: iperf3 ends by itself, or here, whichever comes first
    await b.check("until ! pidof iperf3; do killall -q iperf3; usleep 10000; done");
    await a.check("iperf3 --server --daemon");
    await expectEveryPing(a, b, 1472);
    await expectEveryPing(b, a, 1472);
    await expectTcpOf(toFirst);
    await expectTcpOf(fromFirst);
  });

  test("a guest that shuts down in order comes back on the same relay", async () => {
    await b.shutdown();
    b = await bootB();
    await expectEveryPing(a, b, 1472);
    await expectTcpOf(toFirst);
  });

  test("SIGTERM ends the relay with status 0, no error logged and its sockets removed", async () => {
    const { status, signal, elapsedMs } = await relay.stop();
    console.log(`the relay ended ${Math.round(elapsedMs)} ms after SIGTERM`);
    expect({ status, signal }).toEqual({ status: 0, signal: null });
    expect(relay.sockets.filter((path) => existsSync(path))).toEqual([]);
    expect(relay.log).not.toMatch(/error|exception|unhandled|fatal/i);
  });
});
