/** A lane with work of all kinds, for tests that watch or disturb its accesses to guest memory. */
import { RawPacked } from "./raw-packed.ts";
import { INDIRECT, NEXT, type RawRing, WRITE } from "./raw-ring.ts";
import { DATA, type Format, type Options, SEAM, Stage } from "./stage.ts";

/** Direct and indirect chains, spread headers, a frame that is merged; all offered once. */
export function busyStage(size: number, format: Format, options: Options, peer = format): Stage {
  const stage = new Stage({ direction: "transmit", size, format, peer }, { variant: "hooked", ...options });
  for (const [raw, flags] of [
    [stage.transmitq, 0],
    [stage.receiveq, WRITE],
  ] as const) {
    // a table that crosses files
    const isSplit = !raw.ring.packed;
    raw.write(SEAM - 20n, { gpa: DATA, len: 5, flags: isSplit ? flags | NEXT : flags, next: isSplit ? 2 : 0 });
    if (!isSplit) raw.write(SEAM - 4n, { gpa: DATA, len: 0, flags });
    raw.write(SEAM + 12n, { gpa: DATA + 2048n, len: 200, flags });
    raw.describe(0, { gpa: SEAM - 20n, len: 48, flags: INDIRECT });
    raw.describe(1, { gpa: DATA + 256n, len: 1, flags: flags | NEXT, next: 2 % size });
    if (size > 2) raw.describe(2, { gpa: DATA + 1024n, len: flags ? 64 : 300, flags });
    if (size > 2) raw.describe(3, { gpa: DATA + 4096n, len: flags ? 100 : 64, flags });
  }
  stage.rig.source.ram.slice(DATA, 8192).fill(0);
  offerAll(stage);
  return stage;
}

/** Offers all chains once more, as far as they fit. */
export function offerAll({ transmitq, receiveq }: Stage): void {
  for (const raw of [transmitq, receiveq]) {
    for (const head of raw.ring.size > 2 ? [0, 1, 3] : [0, 0]) if (hasRoom(raw, head === 1 ? 2 : 1)) raw.offer(head);
  }
}

function hasRoom(raw: RawRing, slots: number): boolean {
  return !(raw instanceof RawPacked) || raw.free >= slots;
}
