/**
 * WebAssembly text of the guest accessors (assembly/guest.ts) for a number of segments per end.
 *
 * Segment n of the source is memory "source<n>", of the destination "destination<n>": shared memory64s. With one
 * segment an accessor is a choice between two memories that folds away, for `end` is a constant wherever the core uses it. With more,
 * it is a br_table over all of them.
 */
import { SEGMENT_PAGES } from "../../src/layout/lane.ts";

/** Below this, a loop of 16-byte moves beats the C call behind memory.copy (measured: README, "Numbers"). */
const SMALL_COPY_BYTES = 256;

const loads: [name: string, instruction: string, result: string][] = [
  ["atomicLoad16", "i32.atomic.load16_u", "i32"],
  ["load8", "i32.load8_u", "i32"],
  ["load16", "i32.load16_u", "i32"],
  ["load32", "i32.load", "i32"],
  ["load64", "i64.load", "i64"],
];
const stores: [name: string, instruction: string, value: string][] = [
  ["atomicStore16", "i32.atomic.store16", "i32"],
  ["store8", "i32.store8", "i32"],
  ["store16", "i32.store16", "i32"],
  ["store32", "i32.store", "i32"],
  ["store64", "i64.store", "i64"],
];

/** The memories in the order of an accessor's index: the source's segments, then the destination's. */
export function segmentNames(segments: number): string[] {
  const numbers = [...Array(segments).keys()];
  return [...numbers.map((n) => `source${n}`), ...numbers.map((n) => `destination${n}`)];
}

/** Memory imports, to stand before all definitions. */
export function memoryImports(segments: number): string {
  return segmentNames(segments)
    .map((name) => `(import "guest" "${name}" (memory $${name} i64 1 ${SEGMENT_PAGES} shared))`)
    .join("\n");
}

/** One function per accessor; `nameOf` gives the name under which the core imports it. */
export function accessorFunctions(segments: number, nameOf: (accessor: string) => string): string {
  const names = segmentNames(segments);
  const index =
    segments === 1
      ? "(local.get $end)"
      : `(i32.add (i32.mul (local.get $end) (i32.const ${segments})) (local.get $segment))`;
  const loadFunctions = loads.map(
    ([
      name,
      instruction,
      result,
    ]) => `(func $${nameOf(name)} (param $end i32) (param $segment i32) (param $at i64) (result ${result})
      ${choose(
        index,
        names.map((memory) => `(return (${alignable(instruction, memory)} (local.get $at)))`),
      )} (unreachable))`,
  );
  const storeFunctions = stores.map(
    ([
      name,
      instruction,
      value,
    ]) => `(func $${nameOf(name)} (param $end i32) (param $segment i32) (param $at i64) (param $value ${value})
      ${choose(
        index,
        names.map((memory) => `(${alignable(instruction, memory)} (local.get $at) (local.get $value)) (return)`),
      )})`,
  );
  return [...loadFunctions, ...storeFunctions, copyFunction(segments, nameOf("copy"))].join("\n");
}

/** Plain accesses are marked unaligned: addresses are the guest's. Atomics are not: their alignment is checked at set-up. */
function alignable(instruction: string, memory: string): string {
  const plain = !/atomic|load8|store8/.test(instruction);
  return `${instruction} $${memory}${plain ? " align=1" : ""}`;
}

/** Runs the case that `index` selects. */
function choose(index: string, cases: string[]): string {
  if (cases.length === 1) return cases[0] ?? "";
  if (cases.length === 2) return `(if ${index} (then ${cases[1]}) (else ${cases[0]}))`;
  const labels = cases.map((_, i) => `$case${i}`);
  let text = `(br_table ${labels.join(" ")} ${labels.at(-1)} ${index})`;
  cases.forEach((body, i) => {
    text = `(block ${labels[i]} ${text}) ${body}`;
  });
  return text;
}

/**
 * copy(toSegment, to, fromSegment, from, length). Small copies go 16 bytes at a time with the last 16 overlapping, so that
 * no length needs a byte loop; the choice of memory is made per move, which a branch predictor hides better than a choice
 * among all pairs.
 */
function copyFunction(segments: number, name: string): string {
  const all = segmentNames(segments);
  const sources = all.slice(0, segments);
  const destinations = all.slice(segments);
  const load = (type: string, at: string) => `(call $guest.${type} (local.get $fromSegment) ${at})`;
  const store = (type: string, at: string, value: string) =>
    `(call $guest.set.${type} (local.get $toSegment) ${at} ${value})`;
  const widths: [type: string, instruction: [string, string], value: string][] = [
    ["v128", ["v128.load", "v128.store"], "v128"],
    ["u64", ["i64.load", "i64.store"], "i64"],
    ["u32", ["i32.load", "i32.store"], "i32"],
    ["u8", ["i32.load8_u", "i32.store8"], "i32"],
  ];
  const moves = widths.flatMap(([type, [load, store], value]) => [
    `(func $guest.${type} (param $segment i32) (param $at i64) (result ${value})
      ${choose(
        "(local.get $segment)",
        sources.map((memory) => `(return (${alignable(load, memory)} (local.get $at)))`),
      )} (unreachable))`,
    `(func $guest.set.${type} (param $segment i32) (param $at i64) (param $value ${value})
      ${choose(
        "(local.get $segment)",
        destinations.map((memory) => `(${alignable(store, memory)} (local.get $at) (local.get $value)) (return)`),
      )})`,
  ]);
  const bulk = destinations.flatMap((to) =>
    sources.map((from) => `(memory.copy $${to} $${from} (local.get $to) (local.get $from) (local.get $wide)) (return)`),
  );
  const pair =
    segments === 1
      ? "(i32.const 0)"
      : `(i32.add (i32.mul (local.get $toSegment) (i32.const ${segments})) (local.get $fromSegment))`;
  /** Two moves of one width, the second ending where the copy ends: lengths from one to two widths. */
  const twoMoves = (type: string, bytes: number) => `
    (if (i64.ge_u (local.get $wide) (i64.const ${bytes})) (then
      (local.set $last (i64.sub (local.get $wide) (i64.const ${bytes})))
      ${store(type, "(local.get $to)", load(type, "(local.get $from)"))}
      ${store(type, "(i64.add (local.get $to) (local.get $last))", load(type, "(i64.add (local.get $from) (local.get $last))"))}
      (return)))`;
  return `${moves.join("\n")}
  (func $${name} (param $toSegment i32) (param $to i64) (param $fromSegment i32) (param $from i64) (param $length i32)
    (local $wide i64) (local $done i64) (local $last i64)
    (local.set $wide (i64.extend_i32_u (local.get $length)))
    (if (i32.gt_u (local.get $length) (i32.const ${SMALL_COPY_BYTES})) (then ${choose(pair, bulk)}))
    (if (i64.ge_u (local.get $wide) (i64.const 16)) (then
      (local.set $last (i64.sub (local.get $wide) (i64.const 16)))
      (loop $more
        ${store("v128", "(i64.add (local.get $to) (local.get $done))", load("v128", "(i64.add (local.get $from) (local.get $done))"))}
        (local.set $done (i64.add (local.get $done) (i64.const 16)))
        (br_if $more (i64.lt_u (local.get $done) (local.get $last))))
      ${store("v128", "(i64.add (local.get $to) (local.get $last))", load("v128", "(i64.add (local.get $from) (local.get $last))"))}
      (return)))
    ${twoMoves("u64", 8)}
    ${twoMoves("u32", 4)}
    (loop $bytes
      (if (i64.lt_u (local.get $done) (local.get $wide)) (then
        ${store("u8", "(i64.add (local.get $to) (local.get $done))", load("u8", "(i64.add (local.get $from) (local.get $done))"))}
        (local.set $done (i64.add (local.get $done) (i64.const 1)))
        (br $bytes)))))`;
}
