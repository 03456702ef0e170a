/**
 * Runs a sequence of commands against a real session with real fds, and against the model; throws where they differ.
 * In process, without a socket: some ten thousand messages a second. Used by session-model.test.ts and by the fuzzer.
 */
import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { openSync, readdirSync } from "node:fs";
import { eventfdCreate } from "../../native/eventfd.ts";
import { duplicate, pipe } from "../../native/fd.ts";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { socketpair } from "../../native/socket.ts";
import { ProtocolError } from "../../src/errors.ts";
import { VHOST_USER_NEED_REPLY, VHOST_USER_REPLY, VHOST_USER_VERSION } from "../../src/layout/vhost-user.ts";
import { VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { closeFds } from "../../src/vhost-user/codec.ts";
import type { Device, MemoryRegion, Vring } from "../../src/vhost-user/device.ts";
import { Session } from "../../src/vhost-user/session.ts";
import { FILE_BYTES, mask, OFFERED, RINGS, SHORT_BYTES } from "./session-commands.ts";
import type { Command, FdName } from "./session-commands.ts";
import { Model, stopBase, Undecided } from "./session-model.ts";
import type { DeviceView, RunningRing } from "./session-model.ts";

/** Remembers what it was told, as a device would have to obey it. */
class ObedientDevice implements Device, DeviceView {
  readonly queuePairs = RINGS / 2;
  readonly queueUnit = "pairs";
  readonly config = undefined;
  readonly memoryMaxBytes = 1n << 40n;
  readonly offered = OFFERED;
  acknowledged = 0n;
  regions: DeviceView["regions"] = [];
  rings: (RunningRing | undefined)[] = Array.from({ length: RINGS }, () => undefined);

  get features(): bigint {
    return this.offered;
  }
  announce(): void {}
  setMtu(): void {}
  async setFeatures(features: bigint): Promise<void> {
    this.acknowledged = features;
  }
  async setMemory(regions: readonly MemoryRegion[], vrings: readonly Vring[]): Promise<void> {
    this.regions = regions.map(withoutFd);
    for (const vring of vrings) await this.updateVring(vring);
  }
  async addMemory(region: MemoryRegion): Promise<void> {
    this.regions.push(withoutFd(region));
  }
  async removeMemory(gpa: bigint): Promise<void> {
    this.regions = this.regions.filter((region) => region.gpa !== gpa);
  }
  async startVring(vring: Vring): Promise<void> {
    strictEqual(this.rings[vring.index], undefined, "started twice");
    this.rings[vring.index] = ringOf(vring, vring.base);
  }
  async stopVring(index: number): Promise<number> {
    const ring = this.rings[index];
    if (!ring) throw new Error(`ring ${index} is stopped and was not started`);
    this.rings[index] = undefined;
    return stopBase(ring.base, (this.acknowledged & mask(VIRTIO_F_RING_PACKED)) !== 0n);
  }
  async updateVring(vring: Vring): Promise<void> {
    const ring = this.rings[vring.index];
    if (!ring) throw new Error(`ring ${vring.index} is updated and was not started`);
    this.rings[vring.index] = ringOf(vring, ring.base);
  }
  async reset(): Promise<void> {
    this.acknowledged = 0n;
    this.regions = [];
    this.rings.fill(undefined);
  }

  get view(): DeviceView {
    return { features: this.acknowledged, regions: this.regions, rings: this.rings };
  }
}

function withoutFd({ gpa, sizeBytes, userAddress, mmapOffset }: MemoryRegion): DeviceView["regions"][number] {
  return { gpa, sizeBytes, userAddress, mmapOffset };
}

function ringOf({ size, desc, avail, used, enabled, kick, call, err, inflight }: Vring, base: number): RunningRing {
  const has = (fd: number | undefined) => fd !== undefined;
  return {
    size,
    base,
    desc,
    avail,
    used,
    enabled,
    kick: has(kick),
    call: has(call),
    err: has(err),
    inflight: inflight?.offset,
  };
}

/** The fds that commands name, for many sequences. */
export class SessionFds implements Disposable {
  readonly #all: number[] = [];
  readonly #named: Record<FdName, number>;

  constructor() {
    const own = (fd: number) => {
      this.#all.push(fd);
      return fd;
    };
    const memory0 = own(memfdCreate("memory0", FILE_BYTES));
    const [socket, otherSocket] = socketpair();
    const [readEnd, writeEnd] = pipe();
    own(otherSocket);
    own(readEnd);
    this.#named = {
      eventfd: own(eventfdCreate()),
      socket: own(socket),
      pipe: own(writeEnd),
      memory0,
      memory1: own(memfdCreate("memory1", FILE_BYTES)),
      readonly: own(openSync(`/proc/self/fd/${memory0}`, "r")),
      short: own(memfdCreate("short", SHORT_BYTES)),
    };
  }

  /** A descriptor of its own, as one that came with a message. */
  duplicate(name: FdName): number {
    return duplicate(this.#named[name]);
  }

  [Symbol.dispose](): void {
    for (const fd of this.#all) close(fd);
  }
}

/**
 * Plays one session to its end, and compares after each command: the answer, and what the device was told. In the end
 * no fd is left. @throws AssertionError
 */
export async function runSequence(commands: readonly Command[], fds: SessionFds): Promise<void> {
  const before = readdirSync("/proc/self/fd").length;
  const device = new ObedientDevice();
  const session = new Session(device);
  const model = new Model();
  try {
    for (const command of commands) if (!(await step(session, device, model, command, fds))) break;
  } finally {
    await session.end();
  }
  deepStrictEqual(device.view, new Model().device, "what a device has when the session has ended");
  strictEqual(readdirSync("/proc/self/fd").length, before, "open file descriptors");
}

/** Returns whether the session goes on. */
async function step(
  session: Session,
  device: ObedientDevice,
  model: Model,
  command: Command,
  fds: SessionFds,
): Promise<boolean> {
  let expected;
  try {
    expected = model.handle(command);
  } catch (error) {
    if (error instanceof Undecided) return false;
    throw error;
  }
  const { request, payload } = command;
  const flags = VHOST_USER_VERSION | (command.ack ? VHOST_USER_NEED_REPLY : 0);
  const message = {
    request,
    flags,
    payload: Buffer.from(payload),
    fds: command.fds.map((name) => fds.duplicate(name)),
  };
  let answer;
  try {
    answer = await session.handle(message);
  } catch (error) {
    if (!(error instanceof ProtocolError && error.recovery === "drop")) throw error;
    strictEqual(expected, "drop", `request ${request}: ${error.message}`);
    return false;
  }
  const what = `answer to request ${request}`;
  if (expected === "nothing" || expected === "drop") {
    strictEqual(answer === undefined ? "nothing" : answer.bytes.toString("hex"), expected, what);
  } else {
    const header = Buffer.from(
      Uint32Array.of(request, VHOST_USER_VERSION | VHOST_USER_REPLY, expected.payload.length).buffer,
    );
    const bytes = Buffer.concat([header, expected.payload]).toString("hex");
    strictEqual(answer?.bytes.toString("hex"), bytes, what);
    strictEqual(answer?.fds.length, expected.fds, `fds with the ${what}`);
    closeFds(answer?.fds ?? []);
  }
  deepStrictEqual(device.view, model.device, `the device after request ${request}`);
  return true;
}
