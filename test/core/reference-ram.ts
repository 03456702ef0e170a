/** A copy of a guest's RAM, addressed by gpa; the memory of the reference model. Little-endian, any alignment. */
export class ReferenceRam {
  readonly #regions: readonly { gpa: bigint; bytes: Uint8Array }[];

  /** @param regions not overlapping; the bytes are used, not copied */
  constructor(regions: readonly { gpa: bigint; bytes: Uint8Array }[]) {
    this.#regions = regions;
  }

  /** The bytes at [gpa, gpa + length), one view for each region it touches; undefined if some of it is no RAM. */
  views(gpa: bigint, length: number): Uint8Array[] | undefined {
    const views: Uint8Array[] = [];
    for (let left = length; left > 0;) {
      const region = this.#regions.find((each) => gpa >= each.gpa && gpa < each.gpa + BigInt(each.bytes.length));
      if (!region) return undefined;
      const at = Number(gpa - region.gpa);
      const view = region.bytes.subarray(at, at + left);
      views.push(view);
      gpa += BigInt(view.length);
      left -= view.length;
    }
    return views;
  }

  u16(gpa: bigint): number {
    return Buffer.concat(this.#mustHave(gpa, 2)).readUInt16LE();
  }

  setU16(gpa: bigint, value: number): void {
    this.#store(gpa, 2, BigInt(value));
  }

  setU32(gpa: bigint, value: number): void {
    this.#store(gpa, 4, BigInt(value));
  }

  #store(gpa: bigint, length: number, value: bigint): void {
    let rest = value;
    for (const view of this.#mustHave(gpa, length)) {
      for (let i = 0; i < view.length; i++, rest >>= 8n) view[i] = Number(rest & 0xffn);
    }
  }

  #mustHave(gpa: bigint, length: number): Uint8Array[] {
    const views = this.views(gpa, length);
    if (!views) throw new RangeError(`the reference needs ${length} bytes at gpa 0x${gpa.toString(16)}`);
    return views;
  }
}
