/** A virtio-net driver through a real relay: unix socket, shared memory, eventfds, core. The loopback port echoes. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { Relay } from "../../src/datapath/relay.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import type { NetDriverOptions } from "../../src/driver/net.ts";
import { ConfigError } from "../../src/errors.ts";
import { VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";

const GPA = 5n << 30n;

type Options = Partial<NetDriverOptions>;

async function echo(options: Options, body: (driver: NetDriver) => void): Promise<void> {
  const directory = mkdtempSync(join(tmpdir(), "net-"));
  using _directory = { [Symbol.dispose]: () => rmSync(directory, { recursive: true }) };
  const path = join(directory, "s");
  await using _relay = await Relay.start({
    links: [[`vhost-user:${path},queues=${options.queuePairs ?? 1}`, "loopback"]],
  });
  using guest = new Guest([{ gpa: GPA, sizeBytes: 64n << 20n }]);
  using driver = await NetDriver.connect({ path, guest, ringSize: 64, ...options });
  body(driver);
}

const frameOf = (length: number, seed: number): Uint8Array =>
  Uint8Array.from({ length }, (_, i) => (i * 7 + seed) & 0xff);

/** Sends `count` frames on a pair and receives as many, asleep whenever there is nothing to do. */
function exchange(driver: NetDriver, index: number, lengths: readonly number[], count: number): void {
  const pair = driver.pairs[index]!;
  let [sent, received] = [0, 0];
  const frame = (k: number): Uint8Array => frameOf(lengths[k % lengths.length]!, k + index);
  while (received < count) {
    const before = sent;
    while (sent < count && pair.transmit(frame(sent))) sent++;
    pair.flush();
    const taken = pair.receive(64, (bytes) => {
      expect(Buffer.compare(bytes, frame(received)), `frame ${received}`).toBe(0);
      received++;
    });
    if (taken === 0 && sent === before) driver.wait(1000, sent < count);
  }
}

const LENGTHS = [14, 60, 1514, 4084, 4085, 8180, 8181, 9014];

test.each<[string, Options]>([
  ["everything offered", {}],
  ["without mergeable buffers", { mergeable: false }],
  ["without event indexes", { eventIdx: false }],
  ["with neither", { mergeable: false, eventIdx: false, indirect: false }],
  ["with receive buffers far smaller than a frame", { receiveBufferBytes: 256, ringSize: 256 }],
  ["packed rings", { packed: true }],
  ["packed rings of a size that is no power of two, in order", { packed: true, inOrder: true, ringSize: 50 }],
  ["packed rings without mergeable buffers and event indexes", { packed: true, mergeable: false, eventIdx: false }],
  ["packed rings with small receive buffers", { packed: true, receiveBufferBytes: 256, ringSize: 200 }],
  ["in order", { inOrder: true }],
])("frames come back equal and in order: %s", { timeout: 30_000 }, async (_, options) => {
  await echo(options, (driver) => {
    const has = (feature: number) => (driver.features & (1n << BigInt(feature))) !== 0n;
    expect([has(VIRTIO_F_RING_PACKED), has(VIRTIO_F_IN_ORDER)]).toEqual([
      options.packed ?? false,
      options.inOrder ?? false,
    ]);
    exchange(driver, 0, LENGTHS, 1000);
  });
});

test("queue pairs are apart: each gets its own frames back", { timeout: 30_000 }, async () => {
  await echo({ queuePairs: 2 }, (driver) => {
    for (const index of [0, 1, 0]) exchange(driver, index, LENGTHS, 200);
  });
});

test("a driver that polls is not called and kicks no more than it publishes; one at rest does not kick at all", async () => {
  await echo({}, (driver) => {
    const [pair] = driver.pairs;
    exchange(driver, 0, [60], 100);
    const { kicks } = pair!;
    expect(kicks).toBeGreaterThan(0);
    pair!.flush();
    pair!.fill();
    expect(pair!.kicks).toBe(kicks);
  });
});

test("a full transmitq refuses the frame and takes it once the device has used others", async () => {
  await echo({ ringSize: 4 }, (driver) => {
    const [pair] = driver.pairs;
    const taken = Array.from({ length: 5 }, () => pair!.transmit(frameOf(60, 0)));
    expect(taken).toEqual([true, true, true, true, false]);
    pair!.flush();
    while (!pair!.transmit(frameOf(60, 0))) {
      driver.wait(1000, true);
      pair!.flush();
    }
  });
});

test("nobody listens: ConfigError", async () => {
  using guest = new Guest([{ gpa: GPA, sizeBytes: 1n << 20n }]);
  await expect(NetDriver.connect({ path: join(tmpdir(), "nobody-listens-here"), guest })).rejects.toThrow(ConfigError);
});
