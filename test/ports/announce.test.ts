/** A guest that was migrated here is announced: to the network, or by itself. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { Relay } from "../../src/index.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS } from "../../src/layout/virtio.ts";
import { rarpFrame } from "../../src/ports/rarp.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

const MAC = Buffer.from("525400123456", "hex");

let directory: string;
let open: AsyncDisposableStack;
const path = (name: string): string => join(directory, name);

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new AsyncDisposableStack();
  open.defer(() => rmSync(directory, { recursive: true }));
});
afterEach(() => open.disposeAsync());

it("the frame is a reverse ARP request of the station for itself, to all", () => {
  expect(Buffer.from(rarpFrame(MAC)).toString("hex")).toBe(
    "ffffffffffff" +
      "525400123456" +
      "8035" +
      "0001" +
      "0800" +
      "06" +
      "04" +
      "0003" +
      "525400123456" +
      "00000000" +
      "525400123456" +
      "00000000" +
      "00".repeat(18),
  );
});

it("SEND_RARP: the guest at the other end of the link receives it", async () => {
  open.use(await Relay.start({ links: [[`vhost-user:${path("a")}`, `vhost-user:${path("b")}`]] }));
  const guest = open.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]));
  const receiver = open.use(await NetDriver.connect({ path: path("b"), guest }));
  // The way from a to b exists once a has a transmitq
  const other = open.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]));
  const sender = open.use(await NetDriver.connect({ path: path("a"), guest: other }));
  await sender.frontend.setProtocolFeatures(
    (1n << BigInt(L.VHOST_USER_PROTOCOL_F_RARP)) | (1n << BigInt(L.VHOST_USER_PROTOCOL_F_REPLY_ACK)),
  );
  await sender.frontend.command(L.VHOST_USER_SEND_RARP, Buffer.concat([MAC, Buffer.alloc(2)]));
  const received: string[] = [];
  const take = () => {
    receiver.pairs[0]?.receive(1, (bytes) => received.push(Buffer.from(bytes).toString("hex")));
    return received;
  };
  await expect.poll(take).toEqual([Buffer.from(rarpFrame(MAC)).toString("hex")]);
});

it.each([
  ["", false],
  [",guest-announce", true],
])(
  "port option %j: VIRTIO_NET_F_GUEST_ANNOUNCE %s, and VIRTIO_NET_F_STATUS stays the front-end's",
  async (option, offered) => {
    open.use(await Relay.start({ links: [[`vhost-user:${path("a")}${option}`, "loopback"]] }));
    const features = await open.use(Frontend.connect(path("a"))).getFeatures();
    const has = (bit: number) => ((features >> BigInt(bit)) & 1n) === 1n;
    expect(has(VIRTIO_NET_F_GUEST_ANNOUNCE)).toBe(offered);
    expect(has(VIRTIO_NET_F_STATUS)).toBe(false);
  },
);
