/**
 * Two unmodified Linux guests talk through `vhost-relay run`, and one of them dies and comes back.
 *
 * The tests of this file go through the life of one relay in the order they are written in.
 */
import { existsSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { expectEveryPing } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { Relay } from "./relay.ts";
import { missingTools } from "./tools.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingTools("linux.uml", ...INITRAMFS_TOOLS);
const seconds = Number(process.env["GUEST_TRAFFIC_SECONDS"] ?? (process.env["CI"] === "true" ? 10 : 2));

/** iperf3's option for the direction of traffic; its client runs on the second guest. */
const toFirst = "";
const fromFirst = "--reverse";
type Direction = typeof toFirst | typeof fromFirst;

/** The parts of iperf3's JSON report that tell whether traffic arrived. */
interface IperfReport {
  readonly error?: string;
  readonly end: {
    readonly sum_received?: { readonly bytes: number; readonly seconds: number };
    readonly sum?: { readonly packets: number; readonly lost_packets: number };
  };
}

describe.skipIf(missing !== undefined)(`two Linux guests, one link${missing ? `: ${missing}` : ""}`, () => {
  let relay: Relay;
  let a: UmlGuest;
  let b: UmlGuest;

  const bootA = () => UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" });
  const bootB = () => UmlGuest.boot({ socket: relay.sockets[1], ip: "10.0.0.2" });

  async function iperf(direction: Direction, ...options: string[]): Promise<IperfReport> {
    const command = ["iperf3 --json --client", a.ip, "--time", seconds, direction, ...options].join(" ");
    const report = JSON.parse((await b.run(command)).output) as IperfReport;
    expect(report.error).toBeUndefined();
    return report;
  }

  async function expectTcp(direction: Direction): Promise<void> {
    const { bytes, seconds: elapsed } = (await iperf(direction)).end.sum_received!;
    console.log(
      `TCP ${direction === toFirst ? "to" : "from"} the first guest: ${Math.round((bytes * 8e-6) / elapsed)} Mbit/s`,
    );
    // a stalled link passes a window or two and no more
    expect(bytes).toBeGreaterThan(seconds * 1e6);
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

  test("TCP runs from the second guest to the first", () => expectTcp(toFirst));

  test("TCP runs from the first guest to the second", () => expectTcp(fromFirst));

  test("UDP datagrams arrive both ways", async () => {
    for (const direction of [toFirst, fromFirst] as const) {
      const { packets, lost_packets: lost } = (await iperf(direction, "--udp", "--bitrate 20M")).end.sum!;
      expect(packets).toBeGreaterThan(100);
      // a guest may lose some in its socket's buffer when the machine is busy; a broken link loses all
      expect(packets - lost).toBeGreaterThan(packets / 2);
    }
  });

  test("frames of 9000 bytes pass in one piece", async () => {
    const received = "cat /sys/class/net/eth0/statistics/rx_packets";
    for (const guest of [a, b]) await guest.check("ip link set eth0 mtu 9000");
    const before = Number(await a.check(received));
    await expectEveryPing(b, a, 8972);
    // fragments would be seven times as many; a few ARP packets may be among them
    expect(Number(await a.check(received)) - before).toBeLessThan(100);
    await expectTcp(toFirst);
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
    await expectTcp(toFirst);
    await expectTcp(fromFirst);
  });

  test("a guest that shuts down in order comes back on the same relay", async () => {
    await b.shutdown();
    b = await bootB();
    await expectEveryPing(a, b, 1472);
    await expectTcp(toFirst);
  });

  test("SIGTERM ends the relay with status 0, no error logged and its sockets removed", async () => {
    const { status, signal, elapsedMs } = await relay.stop();
    console.log(`the relay ended ${Math.round(elapsedMs)} ms after SIGTERM`);
    expect({ status, signal }).toEqual({ status: 0, signal: null });
    expect(relay.sockets.filter((path) => existsSync(path))).toEqual([]);
    expect(relay.log).not.toMatch(/error|exception|unhandled|fatal/i);
  });
});
