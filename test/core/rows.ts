/** Rows of the catalogue of bad inputs that are about one chain, and what must come of such a chain. */
import { expect } from "vitest";
import { DATA, type Format, type Options, RAM_END, SEAM, Stage, type Where, everywhere } from "./stage.ts";

export const HOLE = 0x8000_0000n;
export const TOP = 0xffff_ffff_ffff_ffffn;

/** Lays a chain over descriptors 0, 1, ... of the ring under attack, of `size`. */
export type Row = [name: string, lay: (stage: Stage, size: number) => void, options?: Options];

interface Case {
  name: string;
  row: Row;
  where: Required<Where>;
}

/** Every row at every ring of the formats. */
export function crossed(rows: Row[], ...formats: Format[]): Case[] {
  return rows.flatMap((row) => everywhere(...formats).map((where) => ({ name: row[0], row, where })));
}

/** The chain comes back with length 0, and the next ones work. */
export function mustRefuse({ row: [, lay, options], where }: Case): void {
  const stage = new Stage(where, options);
  const { direction, size } = where;
  lay(stage, size);
  stage.ring.offer(0);
  if (direction === "receive") stage.send();
  const { taken, waiting } = stage.judge.poll();
  expect(stage.ring.used()).toEqual([{ id: 0, len: 0 }]);
  const { malformedBuffers, drops, packets } = stage.rig.counters;
  if (direction === "transmit") {
    expect({ taken, malformed: drops.malformed }).toEqual({ taken: 1, malformed: 1 });
  } else {
    expect({ taken, waiting, malformedBuffers }).toEqual({ taken: 0, waiting: true, malformedBuffers: 1 });
    stage.post();
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.ring.used()).toEqual([{ id: 0, len: 112 }]);
  }
  expect(packets).toBe(0);
  stage.mustDeliver();
}

/** The chain, of 112 bytes, carries a frame of 100. */
export function mustAccept({ row: [, lay, options], where }: Case): void {
  const stage = new Stage(where, options);
  const { direction, size } = where;
  lay(stage, size);
  if (direction === "receive") stage.send();
  else {
    stage.rig.source.ram.slice(options?.zeroPage ? 0n : DATA, 2).fill(0); // its net header asks for nothing
    for (const at of [SEAM - 50n, RAM_END - 112n]) stage.rig.source.ram.slice(at, 2).fill(0);
    stage.post();
    lay(stage, size);
  }
  stage.ring.offer(0);
  expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
  expect(stage.ring.used()).toEqual([{ id: 0, len: direction === "transmit" ? 0 : 112 }]);
  expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
  stage.mustDeliver();
}
