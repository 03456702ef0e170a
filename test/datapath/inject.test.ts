/** Frames of the control plane's own making: a port sends one to the other end of its link as if its guest had. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { Link } from "../../src/datapath/link.ts";
import { Pollers } from "../../src/datapath/poller.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import { RECEIVEQ, TRANSMITQ } from "../../src/layout/virtio.ts";
import { VhostUserPort } from "../../src/ports/vhost-user.ts";
import { exchange, frame } from "./traffic.ts";

let directory: string;
let open: AsyncDisposableStack;
let link: Link;
/** What the link gave port a. */
let inject: (frame: Uint8Array) => void;

const path = (name: string): string => join(directory, `${name}.sock`);

async function connect(name: string, packed: boolean): Promise<NetDriver> {
  const guest = open.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]));
  return open.use(await NetDriver.connect({ path: path(name), guest, packed }));
}

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new AsyncDisposableStack();
  open.defer(() => rmSync(directory, { recursive: true }));
  const ignore = (): void => undefined;
  const pollers = new Pollers({ mode: "adaptive", cpus: [], pollers: 1, stallMs: 60_000 }, ignore, ignore);
  open.defer(() => pollers.close());
  await pollers.ready();
  const makePort = (name: string) => {
    const options = { queuePairs: 1, queueUnit: "pairs", mac: undefined, mtu: undefined } as const;
    return new VhostUserPort({ ...options, socket: { path: path(name) }, spec: name, onEvent: ignore });
  };
  const ports = [makePort("a"), makePort("b")] as const;
  const openPort = ports[0].open.bind(ports[0]);
  ports[0].open = (side) => {
    inject = side.inject;
    return openPort(side);
  };
  let lanes = 0;
  link = new Link("link", ports, pollers, () => lanes++);
  await link.open();
  open.defer(() => link.close());
});

afterEach(() => open.disposeAsync());

/** A frame that fits every buffer. */
const small = (k: number): Uint8Array => frame(k).slice(0, 60);

/** Sends a frame that is to be dropped; a message of the front-end's afterwards is handled after it. */
async function injectInVain(driver: NetDriver): Promise<void> {
  inject(small(0));
  await driver.frontend.setVringEnable(RECEIVEQ, true);
}

/** Waits for one frame. */
async function received(driver: NetDriver): Promise<Uint8Array> {
  let got: Uint8Array | undefined;
  const take = () => (driver.pairs[0]!.receive(1, (bytes) => (got = bytes.slice())), got !== undefined);
  await expect.poll(take, { interval: 1 }).toBe(true);
  return got!;
}

it.each([false, true])("arrives whole, between the guest's own: packed %s", async (packed) => {
  const a = await connect("a", packed);
  const b = await connect("b", packed);
  for (const length of [14, 60, 1514]) {
    await exchange(a, b, 100);
    inject(frame(7).slice(0, length));
    expect(Buffer.compare(await received(b), frame(7).slice(0, length))).toBe(0);
  }
  await exchange(a, b, 100);
  expect(() => inject(new Uint8Array(1515))).toThrow(RangeError);
});

it("is dropped where there is no receiver, no buffer or no running transmitq; traffic is not disturbed", async () => {
  inject(small(0)); // nobody is there
  const a = await connect("a", false);
  await injectInVain(a); // no receiver
  const b = await connect("b", false);
  const { transmitq } = a.pairs[0]!;
  const waits = () => link.lanes.find(({ source }) => source.spec === "a")?.lane.counters.waits ?? 0;
  let sent = 0;
  while (waits() === 0) {
    for (; a.pairs[0]!.transmit(small(sent)); sent++);
    a.pairs[0]!.flush();
    await new Promise((resolve) => setImmediate(resolve));
  }
  await injectInVain(b); // no buffer
  let count = 0;
  const takeAll = () => {
    b.pairs[0]!.receive(64, (bytes) => expect(Buffer.compare(bytes, small(count++))).toBe(0));
    return count;
  };
  await expect.poll(takeAll, { interval: 1 }).toBe(sent);
  await expect.poll(() => (a.pairs[0]!.flush(), transmitq.outstanding)).toBe(0);
  await a.frontend.getVringBase(TRANSMITQ);
  await injectInVain(b); // no running lane
  expect(takeAll()).toBe(sent);
});
