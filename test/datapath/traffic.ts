/** Frames between two drivers in a test: numbered, of many sizes, checked byte for byte. */
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import type { NetDriver } from "../../src/driver/net.ts";

/** Frame k of a sequence: from 60 to 9014 bytes, its number at the start of the payload, every byte depending on it. */
export function frame(k: number): Uint8Array {
  const start = k % 251;
  const bytes = filling.slice(start, start + 60 + ((k * 2003) % 8955));
  new DataView(bytes.buffer).setUint32(14, k);
  return bytes;
}

const filling = Uint8Array.from({ length: 16_384 }, (_, i) => (i * i * 7 + (i >> 3)) & 0xff);

/** Sends frames first..first+count-1 from one driver's pair to the other's, and checks that they arrive whole and in order. */
export async function exchange(
  from: NetDriver,
  to: NetDriver,
  count: number,
  { first = 0, pair = 0 } = {},
): Promise<void> {
  let sent = 0;
  let received = 0;
  const check = (bytes: Uint8Array): void => {
    expect(Buffer.compare(bytes, frame(first + received)), `frame ${first + received}`).toBe(0);
    received++;
  };
  for (let idle = 0; received < count;) {
    const before = sent + received;
    while (sent < count && from.pairs[pair]!.transmit(frame(first + sent))) sent++;
    from.pairs[pair]!.flush();
    to.pairs[pair]!.receive(64, check);
    idle = sent + received === before ? idle + 1 : 0;
    expect(idle, `${received} of ${sent} frames arrived`).toBeLessThan(2000);
    if (idle > 0) await sleep(1);
  }
}
