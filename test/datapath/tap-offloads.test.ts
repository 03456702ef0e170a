/**
 * Offloads between a guest and a TAP interface: the interface leaves to the guest what its driver takes and no more, and
 * takes what the driver leaves to it. Truth: virtio 1.3, 5.1.6.2; Documentation/networking/tuntap.rst.
 */
import { execFileSync } from "node:child_process";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { closeSync, readSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { changeInterface, findInterface } from "../../native/network-interface.ts";
import { openTap, setOffloads } from "../../native/tun.ts";
import { TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6 } from "../../src/layout/tun.ts";
import {
  NET_HDR_CSUM_OFFSET,
  NET_HDR_CSUM_START,
  NET_HDR_FLAGS,
  NET_HDR_GSO_SIZE,
  NET_HDR_GSO_TYPE,
  NET_HDR_SIZE,
  VIRTIO_NET_F_CSUM,
  VIRTIO_NET_F_GUEST_CSUM,
  VIRTIO_NET_F_GUEST_ECN,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
  VIRTIO_NET_F_HOST_ECN,
  VIRTIO_NET_F_HOST_TSO4,
  VIRTIO_NET_F_HOST_TSO6,
  VIRTIO_NET_F_HOST_USO,
  VIRTIO_NET_HDR_F_DATA_VALID,
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_NET_HDR_GSO_NONE,
  VIRTIO_NET_HDR_GSO_TCPV4,
} from "../../src/layout/virtio.ts";
import {
  GUEST_MAC,
  HOST_MAC,
  PacketSocket,
  TRANSPORT,
  isNumbered,
  isSound,
  netHeader,
  numbered,
  reversed,
  tcpFrame,
  udpFrame,
  type Flow,
} from "./tap-packets.ts";
import { Stage, enterNetwork, ip, until } from "./tap-stage.ts";
import type { Received, Vm } from "./tap-vm.ts";

const skipped = enterNetwork();
let stage: Stage;

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
  stage = new Stage();
});

afterEach(async () => {
  if (skipped === undefined) await stage.close();
});

/** linux/virtio_net.h */
const VIRTIO_NET_HDR_GSO_UDP_L4 = 5;
const UDP_CSUM = 6;
const TCP_CSUM = 16;
const TCP_PAYLOAD = TRANSPORT + 20;
const UDP_PAYLOAD = TRANSPORT + 8;
const MSS = 1448;
const SYN = 2;
const PSH = 8;
const ACK = 16;
const LEFT = [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];
const TAKEN = [
  VIRTIO_NET_F_GUEST_CSUM,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_GUEST_ECN,
] as const;
const USO = [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
const has = (features: bigint, number: number): boolean => ((features >> BigInt(number)) & 1n) === 1n;
const IPPROTO_TCP = 6;
const IPPROTO_UDP = 17;
const content = Buffer.from(Uint8Array.from({ length: 60_000 }, (_, i) => (i * 31 + (i >> 8)) & 0xff));

/** Whether this kernel lets a driver leave and take UDP segmentation: since Linux 6.2. */
function knowsUso(): boolean {
  const { fds } = openTap("probe", 1);
  try {
    setOffloads(fds[0]!, TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6);
    return true;
  } catch {
    return false;
  } finally {
    fds.forEach(close);
  }
}

/** From the host to the guest. */
const flow: Flow = {
  macs: { from: HOST_MAC, to: GUEST_MAC },
  ips: { from: "10.7.0.1", to: "10.7.0.2" },
  ports: { from: 4000, to: 5000 },
};

/** From the guest to the stack of the host, at this interface. */
function toHost(name: string, ports = { from: 5000, to: 4000 }): Flow {
  const address = findInterface(name)!.address.replaceAll(":", "");
  return { ...reversed(flow), macs: { from: GUEST_MAC, to: address }, ports };
}

/** Gives the host an address at an interface. */
function addressed(name: string): void {
  ip("addr", "add", `${flow.ips.from}/24`, "dev", name);
  ip("neigh", "add", flow.ips.to, "lladdr", "02:00:00:00:00:02", "dev", name);
}

/** Waits until the bridge sends to its port. */
async function forwards(port: string): Promise<void> {
  await until(`the bridge forwards to ${port}`, () => ip("-d", "link", "show", port).includes("state forwarding"));
}

const gso = (headerBytes: number, fields: { gsoType: number; gsoBytes: number; csumOffset: number }): Buffer =>
  netHeader({ flags: VIRTIO_NET_HDR_F_NEEDS_CSUM, headerBytes, csumStart: TRANSPORT, ...fields });
const tso = (payload: number, size = MSS): Buffer =>
  gso(TCP_PAYLOAD, {
    gsoType: payload > size ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_NONE,
    gsoBytes: payload > size ? size : 0,
    csumOffset: TCP_CSUM,
  });
const partialUdp = netHeader({
  flags: VIRTIO_NET_HDR_F_NEEDS_CSUM,
  csumStart: TRANSPORT,
  csumOffset: UDP_CSUM,
});

/** Waits for frames of IPv4 that carry so many bytes behind their headers. */
async function arrived(vm: Vm, payloadAt: number, bytes: number): Promise<Received[]> {
  const found: Received[] = [];
  const length = () => found.reduce((sum, { frame }) => sum + frame.length - payloadAt, 0);
  await until(`${bytes} bytes have arrived`, () => {
    vm.supply();
    // The host has things to say of its own, of its multicast groups for one.
    const isOurs = (frame: Buffer) =>
      frame.readUInt16BE(12) === 0x0800 && [IPPROTO_TCP, IPPROTO_UDP].includes(frame[23]!);
    found.push(...vm.receive().filter(({ frame }) => isOurs(frame)));
    return length() >= bytes;
  });
  return found;
}

/** What the frames carry, in the order of TCP's sequence numbers, from `first` on. */
function joined(frames: readonly Buffer[], first: number): Buffer {
  let next = first;
  const parts = frames
    .toSorted(
      (a, b) => ((a.readUInt32BE(TRANSPORT + 4) - first) >>> 0) - ((b.readUInt32BE(TRANSPORT + 4) - first) >>> 0),
    )
    .map((frame) => {
      expect(frame.readUInt32BE(TRANSPORT + 4)).toBe(next);
      const part = frame.subarray(TRANSPORT + 4 * (frame[TRANSPORT + 12]! >> 4), 14 + frame.readUInt16BE(16));
      next = (next + part.length) >>> 0;
      return part;
    });
  return Buffer.concat(parts);
}

describe("features that are offered", () => {
  it("are those that the interface and this kernel know", async () => {
    const uso = knowsUso();
    await stage.start(["tap:tap0"]);
    const { offered } = await stage.vm("a");
    for (const feature of [...LEFT, ...TAKEN]) expect([feature, has(offered, feature)]).toEqual([feature, true]);
    for (const feature of USO) expect([feature, has(offered, feature)]).toEqual([feature, uso]);
  });

  it("UDP segmentation is not where another VM is at the other end", async () => {
    await stage.start(["loopback"]);
    const { offered } = await stage.vm("a");
    for (const feature of USO) expect(has(offered, feature)).toBe(false);
  });
});

describe("to the guest", () => {
  const drivers: [string, number[], { csum: boolean; tso: boolean }][] = [
    ["takes nothing", [], { csum: false, tso: false }],
    ["takes checksums", [VIRTIO_NET_F_GUEST_CSUM], { csum: true, tso: false }],
    ["takes TCP segments of IPv6 only", [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6], { csum: true, tso: false }],
    ["takes TCP segments and no checksums: nothing", [VIRTIO_NET_F_GUEST_TSO4], { csum: false, tso: false }],
    ["takes all", [...TAKEN], { csum: true, tso: true }],
  ];
  for (const version1 of [true, false]) {
    it.each(version1 ? drivers : [drivers[0]!, drivers[4]!])(
      `a driver that %s, headers of ${version1 ? 12 : 10} bytes`,
      async (_, features, takes) => {
        await stage.start(["tap:tap0"]);
        const bufferBytes = version1 ? 2048 : 65_600;
        const vm = await stage.vm("a", { features, version1, mergeable: version1, bufferBytes });
        const network = stage.open.use(new PacketSocket("tap0", true));

        network.send(udpFrame(flow, content.subarray(0, 1000), "partial"), partialUdp);
        const [datagram] = await arrived(vm, UDP_PAYLOAD, 1000);
        expect(datagram!.frame.subarray(UDP_PAYLOAD).equals(content.subarray(0, 1000))).toBe(true);
        expect(datagram!.header).toEqual(takes.csum ? partialUdp : Buffer.alloc(10));
        expect(isSound(datagram!.frame)).toBe(!takes.csum);

        const position = { sequence: 0xffff_f000, acknowledged: 1, flags: ACK };
        network.send(tcpFrame(flow, position, content.subarray(0, 20_000), "partial"), tso(20_000));
        const found = await arrived(vm, TCP_PAYLOAD, 20_000);
        expect(
          joined(
            found.map(({ frame }) => frame),
            position.sequence,
          ).equals(content.subarray(0, 20_000)),
        ).toBe(true);
        if (takes.tso) {
          expect(found).toHaveLength(1);
          const [{ header, buffers }] = found as [Received];
          expect(header[NET_HDR_GSO_TYPE]).toBe(VIRTIO_NET_HDR_GSO_TCPV4);
          expect(header.readUInt16LE(NET_HDR_GSO_SIZE)).toBe(MSS);
          expect(header[NET_HDR_FLAGS]).toBe(VIRTIO_NET_HDR_F_NEEDS_CSUM);
          expect(header.readUInt16LE(NET_HDR_CSUM_START)).toBe(TRANSPORT);
          expect(header.readUInt16LE(NET_HDR_CSUM_OFFSET)).toBe(TCP_CSUM);
          expect(buffers).toBe(version1 ? 10 : 1);
        } else {
          expect(found).toHaveLength(Math.ceil(20_000 / MSS));
          for (const { header, frame } of found) {
            expect(header[NET_HDR_GSO_TYPE]).toBe(VIRTIO_NET_HDR_GSO_NONE);
            if (takes.csum && header[NET_HDR_FLAGS] === VIRTIO_NET_HDR_F_NEEDS_CSUM) continue;
            expect(header).toEqual(Buffer.alloc(10));
            expect(isSound(frame)).toBe(true);
          }
        }
        expect(stage.dropped).toBe(0);
      },
    );
  }

  it("a frame whose checksum somebody has found good is nothing special to a driver that knows no checksums", async () => {
    ip("link", "add", "br0", "type", "bridge");
    ip("link", "set", "br0", "up");
    ip("link", "add", "near", "type", "veth", "peer", "name", "far");
    ip("link", "set", "near", "up", "master", "br0");
    ip("link", "set", "far", "up");
    // It looks at TCP's checksums.
    execFileSync("ethtool", ["-K", "near", "gro", "on"]);
    execFileSync("ethtool", ["-K", "far", "tso", "off"]);
    await stage.start(["tap:tap0,bridge=br0"]);
    await forwards("tap0");
    await forwards("near");
    const network = stage.open.use(new PacketSocket("far"));
    for (const features of [[], [VIRTIO_NET_F_GUEST_CSUM]]) {
      const vm = await stage.vm("a", { features });
      network.send(tcpFrame(flow, { sequence: 1, acknowledged: 1, flags: ACK }, content.subarray(0, 100), "full"));
      const [{ header, frame }] = (await arrived(vm, TCP_PAYLOAD, 100)) as [Received];
      expect(isSound(frame)).toBe(true);
      const flags = features.length > 0 ? VIRTIO_NET_HDR_F_DATA_VALID : 0;
      expect(header).toEqual(netHeader({ flags }));
      vm.frontend[Symbol.dispose]();
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
    }
  });

  it("UDP segments, where the driver takes them", async (context) => {
    if (!knowsUso()) return context.skip("needs Linux 6.2");
    await stage.start(["tap:tap0"]);
    const header = gso(UDP_PAYLOAD, { gsoType: VIRTIO_NET_HDR_GSO_UDP_L4, gsoBytes: 1000, csumOffset: UDP_CSUM });
    const send = (): void => {
      using network = new PacketSocket("tap0", true);
      network.send(udpFrame(flow, content.subarray(0, 9500), "partial"), header);
    };
    const taking = await stage.vm("a", {
      features: [...TAKEN, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6],
    });
    send();
    const [whole] = await arrived(taking, UDP_PAYLOAD, 9500);
    expect(whole!.header[NET_HDR_GSO_TYPE]).toBe(VIRTIO_NET_HDR_GSO_UDP_L4);
    expect(whole!.header.readUInt16LE(NET_HDR_GSO_SIZE)).toBe(1000);
    expect(whole!.frame.subarray(UDP_PAYLOAD).equals(content.subarray(0, 9500))).toBe(true);
    taking.frontend[Symbol.dispose]();
    await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");

    const other = await stage.vm("a", { features: [...TAKEN] });
    send();
    const parts = await arrived(other, UDP_PAYLOAD, 9500);
    expect(parts.map(({ frame }) => frame.length - UDP_PAYLOAD)).toEqual([...Array(9).fill(1000), 500]);
    expect(Buffer.concat(parts.map(({ frame }) => frame.subarray(UDP_PAYLOAD))).equals(content.subarray(0, 9500))).toBe(
      true,
    );
  });

  it("from one driver to the next: what the one took and had not got yet does not go to the other", async () => {
    await stage.start(["tap:tap0"]);
    const network = stage.open.use(new PacketSocket("tap0", true));
    const send = (): void => {
      for (let i = 0; i < 5; i++) {
        network.send(udpFrame(flow, content.subarray(0, 100), "partial"), partialUdp);
        const position = { sequence: 1, acknowledged: 1, flags: ACK };
        network.send(tcpFrame(flow, position, content.subarray(0, 20_000), "partial"), tso(20_000));
      }
    };
    for (const features of [[...TAKEN], [], [VIRTIO_NET_F_GUEST_CSUM], [...TAKEN]]) {
      const vm = await stage.vm("a", { features });
      vm.supply(4);
      for (let i = 0; i < 3; i++) send();
      await until("some have arrived", () => vm.receive().length > 0);
      for (let more: Received[] = vm.receive(); more.length > 0; more = vm.receive()) vm.supply(4);
      vm.frontend[Symbol.dispose]();
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
      // It judges: what asks for anything, it throws at.
      const judge = await stage.driver("a");
      network.send(numbered(1, 60));
      let got = 0;
      await until(
        "a frame has arrived",
        () => judge.pairs[0]!.receive(64, (frame) => (got += Number(isNumbered(Buffer.from(frame))))) > 0,
      );
      expect(got).toBe(1);
      judge.frontend[Symbol.dispose]();
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
    }
  });
});

describe("from the guest", () => {
  it.each([true, false])("a datagram without its checksum reaches a socket, version 1 %s", async (version1) => {
    await stage.start(["tap:tap0"]);
    addressed("tap0");
    const vm = await stage.vm("a", { features: [...LEFT], version1, mergeable: version1 });
    const socket = stage.open.adopt(createSocket("udp4"), (it) => it.close());
    socket.bind(4000, flow.ips.from);
    await once(socket, "listening");
    const message = once(socket, "message");
    vm.send(udpFrame(toHost("tap0"), content.subarray(0, 1400), "partial"), { header: partialUdp });
    const [got, from] = await message;
    expect(got.equals(content.subarray(0, 1400))).toBe(true);
    expect(from).toMatchObject({ address: flow.ips.to, port: 5000 });
    expect(stage.dropped).toBe(0);
  });

  it("UDP segments reach a socket one by one", async (context) => {
    if (!knowsUso()) return context.skip("needs Linux 6.2");
    await stage.start(["tap:tap0"]);
    addressed("tap0");
    const vm = await stage.vm("a", { features: [...LEFT, VIRTIO_NET_F_HOST_USO], bufferBytes: 65_600, ringSize: 64 });
    const socket = stage.open.adopt(createSocket("udp4"), (it) => it.close());
    socket.bind(4000, flow.ips.from);
    await once(socket, "listening");
    const got: Buffer[] = [];
    socket.on("message", (bytes) => got.push(bytes));
    vm.send(udpFrame(toHost("tap0"), content.subarray(0, 20_300), "partial"), {
      header: gso(UDP_PAYLOAD, { gsoType: VIRTIO_NET_HDR_GSO_UDP_L4, gsoBytes: 1000, csumOffset: UDP_CSUM }),
    });
    await until("all have come", () => got.length >= 21);
    expect(got.map(({ length }) => length)).toEqual([...Array(20).fill(1000), 300]);
    expect(Buffer.concat(got).equals(content.subarray(0, 20_300))).toBe(true);
  });

  it("a TCP connection with a socket: segments as large as there are, both ways", async () => {
    await stage.start(["tap:tap0"]);
    addressed("tap0");
    const vm = await stage.vm("a", { features: [...LEFT, ...TAKEN], bufferBytes: 65_600, ringSize: 64 });
    const server = stage.open.adopt(createServer(), (it) => it.close());
    const got: Buffer[] = [];
    let answer: Socket | undefined;
    server.on("connection", (socket) => {
      answer = socket;
      stage.open.adopt(socket, (it) => it.destroy());
      socket.on("error", () => undefined);
      socket.on("data", (bytes: Buffer) => got.push(bytes));
    });
    server.listen(4000, flow.ips.from);
    await once(server, "listening");
    const there = toHost("tap0");
    const send = (sequence: number, acknowledged: number, flags: number, payload: Uint8Array): void => {
      const frame = tcpFrame(there, { sequence, acknowledged, flags }, payload, "partial");
      expect(vm.send(frame, { header: tso(payload.length) })).toBe(true);
    };
    send(1000, 0, SYN, Buffer.alloc(0));
    const [welcome] = await arrived(vm, TRANSPORT, 20);
    expect(welcome!.frame[TRANSPORT + 13]).toBe(SYN | ACK);
    const first = (welcome!.frame.readUInt32BE(TRANSPORT + 4) + 1) >>> 0;
    send(1001, first, ACK, Buffer.alloc(0));
    send(1001, first, ACK | PSH, content);
    await until("all bytes have come", () => got.reduce((sum, { length }) => sum + length, 0) >= content.length);
    expect(Buffer.concat(got).equals(content)).toBe(true);

    answer!.write(content.subarray(0, 12_000));
    // What is not acknowledged in time comes once more.
    const parts = new Map<number, Received>();
    const bytes = () => [...parts.values()].reduce((sum, { frame }) => sum + frame.readUInt16BE(16) - 40, 0);
    await until("the answer has come", () => {
      vm.supply();
      for (const part of vm.receive()) {
        if (part.frame.readUInt16BE(16) <= 40) continue;
        parts.set(part.frame.readUInt32BE(TRANSPORT + 4), part);
        send(1001 + content.length, (first + bytes()) >>> 0, ACK, Buffer.alloc(0));
      }
      return bytes() >= 12_000;
    });
    const found = [...parts.values()];
    expect(
      joined(
        found.map(({ frame }) => frame),
        first,
      ).equals(content.subarray(0, 12_000)),
    ).toBe(true);
    expect(found.some(({ header }) => header[NET_HDR_GSO_TYPE] === VIRTIO_NET_HDR_GSO_TCPV4)).toBe(true);
    expect(stage.dropped).toBe(0);
  });

  it("through a bridge to a neighbour that takes no offloads: cut and summed up", async () => {
    ip("link", "add", "br0", "type", "bridge");
    ip("link", "set", "br0", "up");
    const other = openTap("other", 1);
    stage.open.defer(() => other.fds.forEach(closeSync));
    changeInterface(findInterface("other")!.index, { isUp: true, master: findInterface("br0")!.index }, "other");
    await stage.start(["tap:tap0,bridge=br0"]);
    await forwards("tap0");
    await forwards("other");
    const vm = await stage.vm("a", { features: [...LEFT], bufferBytes: 65_600, ringSize: 64 });
    const away = { ...reversed(flow), macs: { from: GUEST_MAC, to: "020000000003" } };
    const bytes = Buffer.alloc(70_000);
    const frames: Buffer[] = [];
    const take = (): number => {
      for (;;) {
        try {
          const length = readSync(other.fds[0]!, bytes);
          const frame = Buffer.from(bytes.subarray(0, length));
          // the bridge itself joins a group
          if (frame.toString("hex", NET_HDR_SIZE, NET_HDR_SIZE + 6) === away.macs.to) frames.push(frame);
        } catch (error) {
          expect(error).toMatchObject({ code: "EAGAIN" });
          return frames.length;
        }
      }
    };
    const position = { sequence: 77, acknowledged: 1, flags: ACK };
    vm.send(tcpFrame(away, position, content.subarray(0, 40_000), "partial"), { header: tso(40_000) });
    vm.send(udpFrame(away, content.subarray(0, 500), "partial"), { header: partialUdp });
    const count = Math.ceil(40_000 / MSS) + 1;
    await until("all frames are there", () => take() >= count);
    expect(frames).toHaveLength(count);
    for (const frame of frames) {
      expect(frame.subarray(0, 10)).toEqual(Buffer.alloc(10));
      expect(isSound(frame.subarray(NET_HDR_SIZE))).toBe(true);
    }
    const segments = frames.slice(0, -1).map((frame) => frame.subarray(NET_HDR_SIZE));
    expect(joined(segments, 77).equals(content.subarray(0, 40_000))).toBe(true);
    expect(
      frames
        .at(-1)!
        .subarray(NET_HDR_SIZE + UDP_PAYLOAD)
        .equals(content.subarray(0, 500)),
    ).toBe(true);
  });

  const NONSENSE: [string, Buffer][] = [
    ["a checksum beyond the frame", netHeader({ flags: 1, csumStart: 4000, csumOffset: 6 })],
    [
      "headers longer than the frame",
      netHeader({ flags: 1, gsoType: 1, gsoBytes: 100, headerBytes: 60_000, csumStart: 34, csumOffset: 16 }),
    ],
    ["segments of no known kind", netHeader({ gsoType: 0x55, gsoBytes: 100, headerBytes: 54 })],
    [
      "segments of no bytes",
      netHeader({ flags: 1, gsoType: 1, gsoBytes: 0, headerBytes: 54, csumStart: 34, csumOffset: 16 }),
    ],
  ];
  it.each([true, false])(
    "a header that makes no sense: its frame is dropped, not the next; version 1 %s",
    async (version1) => {
      await stage.start(["tap:tap0"]);
      const vm = await stage.vm("a", { features: [...LEFT], version1, mergeable: version1 });
      const network = stage.open.use(new PacketSocket("tap0"));
      const frame = tcpFrame(
        reversed(flow),
        { sequence: 1, acknowledged: 1, flags: ACK },
        content.subarray(0, 500),
        "partial",
      );
      for (const [i, [, header]] of NONSENSE.entries()) {
        vm.send(numbered(2 * i, 100));
        vm.send(frame, { header });
        vm.send(numbered(2 * i + 1, 200));
      }
      await until("all are given back", () => vm.unsent() === 0);
      for (let k = 0; k < 2 * NONSENSE.length; k++) {
        let got: ReturnType<PacketSocket["receive"]>;
        await until("a frame is out", () => (got = network.receive()) !== undefined);
        expect(got!.frame.equals(numbered(k, k % 2 ? 200 : 100))).toBe(true);
      }
      expect(stage.lane("send").drops).toMatchObject({ badFrame: NONSENSE.length });
      expect(stage.dropped).toBe(NONSENSE.length);
      expect(stage.lane("send").packets).toBe(2 * NONSENSE.length);
    },
  );
});
