/** A QEMU guest on a TAP interface, and the network behind it: what must hold, whatever the machine is like. */
import { expect } from "vitest";
import { Download, expectDownload, expectEveryPing, LongPing, serveFile } from "./guest-traffic.ts";
import { Network } from "./network.ts";
import type { GuestSettings } from "./qemu-pair.ts";
import { QemuGuest } from "./qemu.ts";
import { Relay } from "./relay.ts";

const fileMiB = 16;

export class QemuOnTap implements AsyncDisposable {
  readonly network: Network;
  readonly relay: Relay;
  readonly guest: QemuGuest;

  /** Resolves when both ends serve a file. @param port options of the TAP port, such as `,mtu=9000` */
  static async boot(settings: GuestSettings, port = ""): Promise<QemuOnTap> {
    await using started = new AsyncDisposableStack();
    const network = started.use(await Network.make());
    await network.check(`
      ip tuntap add dev vm0 mode tap multi_queue vnet_hdr
      ip addr add ${network.ip}/24 dev vm0
      ip link set vm0 up`);
    const queues = settings.queuePairs ? `,queues=${settings.queuePairs}` : "";
    const relay = started.use(await Relay.toTap(`tap:vm0${port}`, network, queues));
    const guest = started.use(await QemuGuest.boot({ ...settings, socket: relay.sockets[0], ip: "10.0.0.1" }));
    for (const machine of [guest, network]) await serveFile(machine, fileMiB);
    started.move();
    return new QemuOnTap(network, relay, guest);
  }

  private constructor(network: Network, relay: Relay, guest: QemuGuest) {
    this.network = network;
    this.relay = relay;
    this.guest = guest;
  }

  /** Pings of every kind and TCP, both ways. */
  async expectTraffic(): Promise<void> {
    for (const [from, to] of [
      [this.guest, this.network],
      [this.network, this.guest],
    ] as const) {
      for (const payloadBytes of [56, 1472, 8000]) await expectEveryPing(from, to, payloadBytes);
      await expectDownload(from, to);
    }
  }

  /** SIGKILL for the relay, in the middle of a download: the guest goes on by itself. @param kills how often */
  async expectToSurviveKills(kills: number): Promise<void> {
    const ping = await LongPing.start(this.guest, this.network);
    const download = await Download.start(this.network, this.guest);
    for (let time = 0; time < kills; time++) {
      await download.progress(2 ** 21);
      await this.relay.kill();
      await this.relay.restart();
      expect(await download.hasEnded(), "the download was too fast to be disturbed").toBe(false);
    }
    await download.complete();
    const gaps = await ping.stop();
    console.log(`pings lost, of five a second, in ${kills} kills of the relay: ${gaps.join(" and ") || "none"}`);
    expect(gaps.length).toBeLessThanOrEqual(2 * kills);
    for (const payloadBytes of [56, 8000]) await expectEveryPing(this.network, this.guest, payloadBytes);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const each of [this.guest, this.relay, this.network]) await each[Symbol.asyncDispose]();
  }
}
