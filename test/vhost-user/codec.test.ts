import { describe, expect, it } from "vitest";
import { eventfdCreate } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import * as L from "../../src/layout/vhost-user.ts";
import * as codec from "../../src/vhost-user/codec.ts";
import type { Message } from "../../src/vhost-user/codec.ts";
import { openFds } from "./rig.ts";

/** Feeds bytes to a reader in pieces of at most `step`; fds come with the piece at offset `fdsAt`. */
function read(bytes: Buffer, step: number, fds: number[] = [], fdsAt = 0): Message[] {
  const reader = new codec.MessageReader();
  const messages: Message[] = [];
  for (let offset = 0; offset < bytes.length;) {
    const space = reader.space();
    const count = bytes.copy(space, 0, offset, offset + Math.min(step, space.length));
    const message = reader.push(count, offset <= fdsAt && fdsAt < offset + count ? fds : []);
    if (message) messages.push(message);
    offset += count;
  }
  reader[Symbol.dispose]();
  return messages;
}

const first = codec.encodeMessage(8, L.VHOST_USER_NEED_REPLY, codec.encodeVringState({ index: 1, num: 256 }));
const second = codec.encodeMessage(1, 0, Buffer.alloc(0));

describe("PROTOCOL, 1.2: the header", () => {
  it("is request, flags with version 1, payload size: 12 bytes, no padding", () => {
    expect([...first.subarray(0, 12)]).toEqual([8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0]);
    expect(first.length).toBe(20);
  });

  it.each([0, 2, 3])("BI-013: version bits %i are refused and the connection dropped", (version) => {
    const bytes = Buffer.from(second);
    bytes.writeUInt32LE(version, L.HEADER_FLAGS);
    expect(() => read(bytes, 12)).toThrow(expect.objectContaining({ recovery: "drop" }));
  });

  it.each([L.PAYLOAD_SIZE_MAX + 1, 0x80000000, 0xffffffff])(
    "BI-007, BI-008: a payload size of %i is refused before it is allocated, fds closed",
    (size) => {
      const before = openFds();
      const bytes = Buffer.from(second);
      bytes.writeUInt32LE(size, L.HEADER_PAYLOAD_SIZE);
      using reader = new codec.MessageReader();
      bytes.copy(reader.space());
      expect(() => reader.push(12, [eventfdCreate()])).toThrow(expect.objectContaining({ recovery: "drop" }));
      reader[Symbol.dispose]();
      expect(openFds()).toBe(before);
    },
  );
});

describe("PROTOCOL, 1.1: the stream", () => {
  it.each([1, 5, 12, 4096])("BI-002, BI-006: two messages in pieces of %i bytes come out whole", (step) => {
    const messages = read(Buffer.concat([first, second]), step);
    expect(messages.map(({ request, payload }) => [request, payload.length])).toEqual([
      [8, 8],
      [1, 0],
    ]);
    expect(codec.decodeVringState(messages[0]?.payload as Buffer)).toEqual({ index: 1, num: 256 });
  });

  it("BI-006: fds belong to the message whose header's first byte they came with", () => {
    const fd = eventfdCreate();
    const messages = read(Buffer.concat([first, second]), 4096, [fd], first.length);
    expect(messages.map(({ fds }) => fds)).toEqual([[], [fd]]);
    close(fd);
  });

  it("BI-021: fds that came with a later byte are closed", () => {
    const before = openFds();
    const messages = read(first, 4096, [eventfdCreate()], L.HEADER_SIZE);
    expect(messages[0]?.fds).toEqual([]);
    expect(openFds()).toBe(before);
  });

  it("BI-003: fds of a message that is never completed are closed", () => {
    const before = openFds();
    read(first.subarray(0, 7), 4096, [eventfdCreate()]);
    expect(openFds()).toBe(before);
  });

  it("BI-009: no byte of an earlier payload shows in a later message", () => {
    const payload = Buffer.alloc(8, 0xff);
    const [, later] = read(
      Buffer.concat([codec.encodeMessage(2, 0, payload), codec.encodeMessage(2, 0, Buffer.alloc(4))]),
      4096,
    );
    expect([...(later?.payload ?? [])]).toEqual([0, 0, 0, 0]);
  });
});

describe("PROTOCOL, 3: payload layouts", () => {
  it("vring state: u32 index, u32 num", () => {
    expect(codec.encodeVringState({ index: 1, num: 0x0203 }).toString("hex")).toBe("0100000003020000");
  });

  it("vring address: index, flags, desc, used, avail, log; used before avail", () => {
    const address = { index: 1, flags: 2, desc: 3n, used: 4n, avail: 5n, log: 6n };
    const bytes = codec.encodeVringAddress(address);
    expect([bytes.length, bytes.readBigUInt64LE(8), bytes.readBigUInt64LE(16), bytes.readBigUInt64LE(24)]).toEqual([
      40,
      3n,
      4n,
      5n,
    ]);
    expect(codec.decodeVringAddress(bytes)).toEqual(address);
  });

  it("memory table: u32 count, padding, then gpa, size, user address, mmap offset; only the regions there are", () => {
    const regions = [
      { gpa: 1n, sizeBytes: 2n, userAddress: 3n, mmapOffset: 4n },
      { gpa: 5n, sizeBytes: 6n, userAddress: 7n, mmapOffset: 0xffff_ffff_ffff_ffffn },
    ];
    const bytes = codec.encodeMemTable(regions);
    expect([bytes.length, bytes.readUInt32LE(0), bytes.readBigUInt64LE(8), bytes.readBigUInt64LE(16)]).toEqual([
      72,
      2,
      1n,
      2n,
    ]);
    expect(codec.decodeMemTable(bytes)).toEqual(regions);
  });

  it("u64 keeps all 64 bits", () => {
    expect(codec.decodeU64(codec.encodeU64(0xfedc_ba98_7654_3210n))).toBe(0xfedc_ba98_7654_3210n);
  });
});
