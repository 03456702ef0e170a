/** Queues of TAP interfaces: native/tun.ts. What a port makes of them is in test/ports/tap.test.ts. */
import { execFileSync } from "node:child_process";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { closeSync, openSync, readdirSync, readFileSync, readSync, writeFileSync, writeSync } from "node:fs";
import { beforeAll, beforeEach, describe, expect, it } from "vitest";
import { close, libc } from "../../native/libc.ts";
import { findInterface } from "../../native/network-interface.ts";
import { adoptTap, openTap, setAttached, setDeaf, setOffloads, writeFrame } from "../../native/tun.ts";
import {
  IFF_MULTI_QUEUE,
  IFF_NO_PI,
  IFF_TAP,
  IFF_TUN,
  IFF_VNET_HDR,
  IFREQ_FLAGS,
  IFREQ_SIZE,
  TUN_F_CSUM,
  TUN_F_TSO4,
  TUNSETIFF,
} from "../../src/layout/tun.ts";
import { NET_HDR_SIZE } from "../../src/layout/virtio.ts";
import { missingTools } from "../guests/tools.ts";
import { enterNewNetwork } from "./namespace.ts";

const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;
const ioctl = libc.func("int ioctl(int fd, unsigned long request, void *argument)");
const skipped = missingTools("ip") ?? enterNewNetwork();

beforeAll(() => {
  // IPv6 speaks by itself.
  if (skipped === undefined) writeFileSync("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
});

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
});

function ip(...words: string[]): void {
  execFileSync("ip", words, { stdio: ["ignore", "ignore", "pipe"] });
}

/** A queue as another program opens it. */
function openRaw(name: string, flags: number): number {
  const fd = openSync("/dev/net/tun", "r+");
  const request = Buffer.alloc(IFREQ_SIZE);
  request.write(name);
  request.writeUInt16LE(flags, IFREQ_FLAGS);
  expect(ioctl(fd, TUNSETIFF, request)).toBe(0);
  return fd;
}

/** The flags of open(2). */
function flagsOf(fd: number): number {
  return Number.parseInt(/flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))?.[1] ?? "", 8);
}

function readFrames(fd: number): number {
  const bytes = Buffer.alloc(70_000);
  for (let count = 0; ; count++) {
    try {
      readSync(fd, bytes);
    } catch (error) {
      expect(error).toMatchObject({ code: "EAGAIN" });
      return count;
    }
  }
}

/** Brings an interface up, and has the host's stack send broadcasts to it. */
async function fill(name: string, count: number): Promise<void> {
  ip("link", "set", name, "up");
  ip("addr", "replace", "10.8.0.1/24", "broadcast", "10.8.0.255", "dev", name);
  const socket = createSocket("udp4");
  socket.bind(0, "10.8.0.1");
  await once(socket, "listening");
  socket.setBroadcast(true);
  for (let i = 0; i < count; i++) await new Promise((resolve) => socket.send("x", 9, "10.8.0.255", resolve));
  socket.close();
}

it("opens queues without blocking, and not for programs that are started", () => {
  const tap = openTap(undefined, 2);
  expect(tap).toMatchObject({ name: "tap0", isMultiQueue: true });
  expect(tap.address).toBe(findInterface("tap0")?.address);
  for (const fd of tap.fds) expect(flagsOf(fd) & (O_NONBLOCK | O_CLOEXEC)).toBe(O_NONBLOCK | O_CLOEXEC);
  expect(tap.fds.map(readFrames)).toEqual([0, 0]);
  tap.fds.forEach(close);
  expect(findInterface("tap0")).toBeUndefined();
});

it("an interface has 256 queues at most; none are left open of too many", () => {
  const before = readdirSync("/proc/self/fd").length;
  expect(() => openTap("many", 257)).toThrow(/opening 257 queues of many; an interface has 256 at most.*E2BIG/);
  expect(readdirSync("/proc/self/fd")).toHaveLength(before);
  expect(findInterface("many")).toBeUndefined();
});

it("a net header has 12 bytes, whatever it had", async () => {
  const fd = openRaw("raw", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
  adoptTap([fd]);
  await fill("raw", 1);
  const bytes = Buffer.alloc(2000);
  readSync(fd, bytes);
  // the frame begins with the address of all stations
  expect(bytes.subarray(NET_HDR_SIZE, NET_HDR_SIZE + 6).toString("hex")).toBe("ffffffffffff");
  closeSync(fd);
});

describe("queues that are taken over", () => {
  it.each([
    ["a TUN", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, /fd \d+: odd is a TUN interface; it must be TAP/],
    ["with packet information", IFF_TAP | IFF_VNET_HDR, /odd must be opened with IFF_TAP \| IFF_NO_PI \| IFF_VNET_HDR/],
    ["without a net header", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE, /odd must be opened with/],
  ])("%s: refused", (_, flags, message) => {
    const fd = openRaw("odd", flags);
    expect(() => adoptTap([fd])).toThrow(message);
    closeSync(fd);
  });

  it("are made non-blocking, and not for programs that are started", () => {
    const fd = openRaw("right", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    expect(adoptTap([fd])).toMatchObject({ name: "right", isMultiQueue: false, fds: [fd] });
    expect(flagsOf(fd) & (O_NONBLOCK | O_CLOEXEC)).toBe(O_NONBLOCK | O_CLOEXEC);
    expect(readFrames(fd)).toBe(0);
    closeSync(fd);
  });

  it("an interface that is gone", () => {
    const fd = openRaw("past", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    ip("link", "del", "past");
    expect(() => adoptTap([fd])).toThrow(/is of no interface \(any more\)/);
    closeSync(fd);
  });
});

describe("a queue that is not in use", () => {
  it("detached: empty, gets nothing, takes frames and requests", async () => {
    const tap = openTap("detached", 1);
    const [fd = -1] = tap.fds;
    await fill("detached", 5);
    setAttached(fd, false);
    expect(() => setAttached(fd, false)).toThrow(/detaching the queue of fd \d+: TUNSETQUEUE: EINVAL/);
    await fill("detached", 5);
    expect(writeFrame(fd, new Uint8Array(60))).toBe(true);
    setOffloads(fd, TUN_F_CSUM);
    setAttached(fd, true);
    expect(readFrames(fd)).toBe(0);
    await fill("detached", 5);
    expect(readFrames(fd)).toBe(5);
    tap.fds.forEach(close);
  });

  it("deaf: the same, without multi_queue", async () => {
    ip("tuntap", "add", "dev", "deaf", "mode", "tap");
    const tap = openTap("deaf", 1);
    const [fd = -1] = tap.fds;
    expect(tap.isMultiQueue).toBe(false);
    expect(() => setAttached(fd, false)).toThrow(/EINVAL/);
    await fill("deaf", 5);
    setDeaf(fd, true);
    await fill("deaf", 5);
    expect(readFrames(fd)).toBe(0);
    expect(writeFrame(fd, new Uint8Array(60))).toBe(true);
    setDeaf(fd, false);
    await fill("deaf", 5);
    expect(readFrames(fd)).toBe(5);
    ip("link", "del", "deaf");
    tap.fds.forEach(close);
  });

  it("deaf: killed like that, it leaves nothing that the next one hears of", async () => {
    ip("tuntap", "add", "dev", "left", "mode", "tap");
    const before = openTap("left", 1);
    setDeaf(before.fds[0] as number, true);
    before.fds.forEach(close);
    const after = openTap("left", 1);
    await fill("left", 5);
    expect(readFrames(after.fds[0] as number)).toBe(5);
    // and the one who is given the queue itself
    setDeaf(after.fds[0] as number, true);
    adoptTap(after.fds);
    await fill("left", 5);
    expect(readFrames(after.fds[0] as number)).toBe(5);
    after.fds.forEach(close);
    ip("link", "del", "left");
  });
});

it("offloads that do not go together are refused", () => {
  const { fds } = openTap("tap0", 1);
  const [fd = -1] = fds;
  expect(() => setOffloads(fd, TUN_F_TSO4)).toThrow(
    /offloads of the interface of fd \d+ to 0x2: TUNSETOFFLOAD: EINVAL/,
  );
  fds.forEach(close);
});

it("a frame that an interface does not take is reported", () => {
  const { fds } = openTap("tap0", 1);
  const [fd = -1] = fds;
  expect(writeFrame(fd, new Uint8Array(60))).toBe(false); // it is down
  ip("link", "set", "tap0", "up");
  expect(writeFrame(fd, new Uint8Array(60))).toBe(true);
  expect(writeFrame(fd, new Uint8Array(13))).toBe(false); // shorter than an Ethernet header
  expect(() => writeSync(fd, Buffer.alloc(NET_HDR_SIZE - 1))).toThrow(/EINVAL/);
  fds.forEach(close);
});

it.each([
  ["is missing", "true", "ENOENT", /load the module \(modprobe tun\), give a container --device=\/dev\/net\/tun/],
  ["is root's", "mknod -m 600 /dev/net/tun c 10 200", "EACCES", /let this user .* read and write it, or pass tap:fd=N/],
])("/dev/net/tun %s", (_, make, code, fix) => {
  const url = JSON.stringify(new URL("../../native/tun.ts", import.meta.url));
  const program = `import { openTap } from ${url}; process.seteuid(65534);
    try { openTap("tap0", 1); } catch (error) { console.log(error.message); }`;
  // a mount namespace of its own
  const said = execFileSync(
    "unshare",
    ["--mount", "sh", "-c", `mount -t tmpfs none /dev/net && ${make} && exec "$0" "$@"`].concat([
      process.execPath,
      "--input-type=module",
      "-e",
      program,
    ]),
    { encoding: "utf8" },
  );
  expect(said).toContain(`open: ${code}`);
  expect(said).toMatch(fix);
});
