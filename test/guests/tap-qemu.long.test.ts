/** Machines that QEMU makes on TAP interfaces, one or two for each test: what is not in the short test for the time it takes. */
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, describe, expect, test } from "vitest";
import {
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_MQ,
  VIRTIO_NET_F_MRG_RXBUF,
} from "../../src/layout/virtio.ts";
import { OFFLOAD_FEATURES } from "../../src/ports/offloads.ts";
import {
  Download,
  expectDownload,
  expectEveryPing,
  expectNoComplaints,
  pingFromEveryCpu,
  serveFile,
} from "./guest-traffic.ts";
import { hostEnd } from "./host-end.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { macOf } from "./linux-guest.ts";
import { missingForNetworks, Network } from "./network.ts";
import type { GuestSettings } from "./qemu-pair.ts";
import { QemuOnTap } from "./qemu-tap.ts";
import { QemuGuest } from "./qemu.ts";
import { Relay } from "./relay.ts";

const missing = missingForNetworks("qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS);

describe.skipIf(missing !== undefined)(`QEMU on TAP interfaces${missing ? `: ${missing}` : ""}`, () => {
  let machine: QemuOnTap | undefined;

  async function boot(settings: GuestSettings, port = ""): Promise<QemuOnTap> {
    machine = await QemuOnTap.boot(settings, port);
    const { guest } = machine;
    expect(await guest.hasFeature(VIRTIO_F_RING_PACKED)).toBe(settings.packed ?? false);
    expect(await guest.hasFeature(VIRTIO_NET_F_MRG_RXBUF)).toBe(!settings.noMergeable);
    for (const feature of OFFLOAD_FEATURES) expect(await guest.hasFeature(feature)).toBe(!settings.noOffloads);
    return machine;
  }

  afterEach(async () => {
    await machine?.[Symbol.asyncDispose]();
    machine = undefined;
  });

  describe.each([{ packed: false }, { packed: true }])("packed virtqueues: $packed", (ring) => {
    test.each([
      { noOffloads: false, noMergeable: false },
      { noOffloads: false, noMergeable: true },
      { noOffloads: true, noMergeable: false },
      { noOffloads: true, noMergeable: true },
    ])("no offloads: $noOffloads, no mergeable buffers: $noMergeable", async (settings) => {
      const { relay, guest } = await boot({ ...ring, ...settings });
      await machine!.expectTraffic();
      if (!settings.noOffloads) {
        // the driver tells the device what it takes from now on
        await guest.check("ethtool -K eth0 tx off tso off gro off; ethtool -K eth0 rx off || true");
        await machine!.expectTraffic();
        await guest.check("ethtool -K eth0 tx on tso on gro on; ethtool -K eth0 rx on || true");
        await machine!.expectTraffic();
      }
      expect(relay.log).not.toMatch(/error|refused|stopped|trap/i);
      await expectNoComplaints(guest);
    });

    test("a jumbo MTU that the relay gives to the interface", async () => {
      const { guest, network } = await boot(ring, ",mtu=9000");
      await guest.check("ip link set eth0 mtu 9000");
      expect(await network.check("cat /sys/class/net/vm0/mtu")).toBe("9000\n");
      const before = await network.count("vm0", "rx_packets");
      await expectEveryPing(network, guest, 8972);
      await expectEveryPing(guest, network, 8972);
      expect((await network.count("vm0", "rx_packets")) - before).toBeLessThan(200);
      await machine!.expectTraffic();
    });

    test("four queue pairs: all of them carry frames, fewer and more of them, and a relay killed", async () => {
      const { guest, network, relay } = await boot({ ...ring, queuePairs: 4 });
      expect(await guest.hasFeature(VIRTIO_NET_F_MQ)).toBe(true);
      await machine!.expectTraffic();
      await pingFromEveryCpu(guest, network);
      const { lanes } = await relay.link();
      expect(lanes).toHaveLength(8);
      expect(lanes.filter(({ packets }) => packets < 20)).toEqual([]);
      for (const queues of [2, 1, 4]) {
        await guest.check(`ethtool -L eth0 combined ${queues}`);
        await pingFromEveryCpu(guest, network);
        await machine!.expectTraffic();
      }
      await machine!.expectToSurviveKills(3);
      await guest.check("ethtool -L eth0 combined 2");
      await pingFromEveryCpu(guest, network);
      await expectNoComplaints(guest);
    });

    test("the relay is killed and started again under a download: it comes to its end", async () => {
      await boot(ring);
      await machine!.expectToSurviveKills(3);
      await expectNoComplaints(machine!.guest);
    });
  });

  test("a guest's driver lets its device go and takes it again, under traffic", async () => {
    const { guest, network } = await boot({});
    for (let time = 0; time < 3; time++) {
      await using _flood = network.start("flood", hostEnd("flood", guest.ip, 9, 10_000_000, 1000));
      await guest.check(`
        device=$(basename $(readlink /sys/class/net/eth0/device))
        echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
        echo $device >/sys/bus/virtio/drivers/virtio_net/bind
        ip link set eth0 address ${macOf(guest.ip)} up
        ip addr add ${guest.ip}/24 dev eth0`);
      await delay(200);
    }
    await machine!.expectTraffic();
    await expectNoComplaints(guest);
  });

  test("memory is plugged in under a download", async () => {
    const { guest, network } = await boot({ memoryMaxMiB: 2048 });
    const download = await Download.start(network, guest);
    await download.progress(2 ** 20);
    await guest.plugMemory(256);
    await download.complete();
    // what is used from now on is in part the new memory
    await guest.check("mkdir /fill && mount -t tmpfs -o size=400m fill /fill && head -c 350m /dev/zero >/fill/fill");
    await machine!.expectTraffic();
    await expectNoComplaints(guest);
  });

  test("a legacy device, without VIRTIO_F_VERSION_1", async () => {
    await boot({ legacy: true });
    expect(await machine!.guest.hasFeature(VIRTIO_F_VERSION_1)).toBe(false);
    await machine!.expectTraffic();
    await machine!.expectToSurviveKills(3);
    await expectNoComplaints(machine!.guest);
  });

  test("a legacy device without mergeable buffers: a header of 10 bytes", async () => {
    await boot({ legacy: true, noMergeable: true });
    expect(await machine!.guest.hasFeature(VIRTIO_F_VERSION_1)).toBe(false);
    await machine!.expectTraffic();
    await expectNoComplaints(machine!.guest);
  });

  test("two machines in a bridge, one with offloads, one with none of them and packed virtqueues", async () => {
    await using network = await Network.make();
    await network.check("ip link add br0 type bridge; ip link set br0 up");
    await using relay = await Relay.start({
      links: (a, b) => [a, b].map((path, i) => `vhost-user:${path}=tap:vm${i},bridge=br0`),
      wrap: network.inside,
    });
    const settings = [{}, { packed: true, noOffloads: true, noMergeable: true }] as const;
    const guests = settings.map((each, i) =>
      QemuGuest.boot({ ...each, socket: relay.sockets[i]!, ip: `10.0.0.${i + 1}` }),
    );
    await using a = await guests[0]!;
    await using b = await guests[1]!;
    for (const guest of [a, b]) await serveFile(guest, 16);
    for (const [from, to] of [
      [a, b],
      [b, a],
    ] as const) {
      for (const bytes of [56, 1472, 8000]) await expectEveryPing(from, to, bytes);
      await expectDownload(from, to);
    }
    for (const guest of [a, b]) await expectNoComplaints(guest);
  });
});
