/** Two QEMU guests on one relay, and what must hold while something happens to it or to them. */
import { expect } from "vitest";
import { Download, expectDownload, expectEveryPing, expectNoComplaints, LongPing, serveFile } from "./guest-traffic.ts";
import { QemuGuest } from "./qemu.ts";
import type { QemuOptions } from "./qemu.ts";
import { Relay } from "./relay.ts";

const fileMiB = 16;

export type GuestSettings = Omit<QemuOptions, "socket" | "ip">;

export class QemuPair implements AsyncDisposable {
  readonly relay: Relay;
  readonly a: QemuGuest;
  readonly b: QemuGuest;

  /** @param settings of both guests, or of each */
  static async boot(...settings: [GuestSettings, GuestSettings?]): Promise<QemuPair> {
    const [a, b = a] = settings;
    const options = `${a.queuePairs ? `,queues=${a.queuePairs}` : ""}${a.listen ? ",connect" : ""}`;
    const relay = await Relay.start(options);
    const guests = await Promise.allSettled([
      QemuGuest.boot({ ...a, socket: relay.sockets[0], ip: "10.0.0.1" }),
      QemuGuest.boot({ ...b, socket: relay.sockets[1], ip: "10.0.0.2" }),
    ]);
    const booted = guests.flatMap((guest) => (guest.status === "fulfilled" ? [guest.value] : []));
    try {
      const failed = guests.find((guest) => guest.status === "rejected");
      if (failed) throw failed.reason;
      for (const guest of booted) await serveFile(guest, fileMiB);
    } catch (error) {
      for (const each of [...booted, relay]) await each[Symbol.asyncDispose]();
      throw error;
    }
    return new QemuPair(relay, booted[0]!, booted[1]!);
  }

  private constructor(relay: Relay, a: QemuGuest, b: QemuGuest) {
    this.relay = relay;
    this.a = a;
    this.b = b;
  }

  /** Pings of every kind and TCP, both ways. */
  async expectTraffic(): Promise<void> {
    for (const [from, to] of [
      [this.a, this.b],
      [this.b, this.a],
    ] as const) {
      // 1472 fills an Ethernet frame; 8000 goes as six fragments
      for (const payloadBytes of [56, 1472, 8000]) await expectEveryPing(from, to, payloadBytes);
      await expectDownload(from, to);
    }
  }

  /**
   * Lets something happen, several times, in the middle of a download and under a ping. The download must come to its
   * end, every byte right.
   * @returns gaps in the pings' answers
   */
  async expectToGoOn(times: number, happen: () => Promise<void>): Promise<number[]> {
    const ping = await LongPing.start(this.b, this.a);
    const download = await Download.start(this.a, this.b);
    for (let time = 0; time < times; time++) {
      await download.progress(2 ** 21);
      await happen();
      expect(await download.hasEnded(), "the download was too fast to be disturbed").toBe(false);
    }
    await download.complete();
    return ping.stop();
  }

  /** SIGKILL for the relay, in the middle of traffic, three times: both guests go on by themselves. */
  async expectToSurviveKills(): Promise<void> {
    const kills = 3;
    const gaps = await this.expectToGoOn(kills, async () => {
      await this.relay.kill();
      await this.relay.restart();
    });
    console.log(`pings lost, of five a second, in ${kills} kills of the relay: ${gaps.join(" and ") || "none"}`);
    // Each costs what the relay had in hand, and what the guest that is back first sends to the other. What waits in the
    // virtqueues is answered late, unless the guest's kernel notices that its link is down: then it drops that itself.
    expect(gaps.length).toBeLessThanOrEqual(2 * kills);
  }

  async expectNoComplaints(): Promise<void> {
    for (const guest of [this.a, this.b]) await expectNoComplaints(guest);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const each of [this.a, this.b, this.relay]) await each[Symbol.asyncDispose]();
  }
}
