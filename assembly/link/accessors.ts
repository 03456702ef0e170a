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
  ["atomicLoad64", "i64.atomic.load", "i64"],
  ["load8", "i32.load8_u", "i32"],
  ["load16", "i32.load16_u", "i32"],
  ["load32", "i32.load", "i32"],
  ["load64", "i64.load", "i64"],
];
const stores: [name: string, instruction: string, value: string][] = [
  ["atomicStore16", "i32.atomic.store16", "i32"],
  ["atomicStore64", "i64.atomic.store", "i64"],
  ["store8", "i32.store8", "i32"],
  ["store16", "i32.store16", "i32"],
  ["store32", "i32.store", "i32"],
  ["store64", "i64.store", "i64"],
];

/** The memories in the order of an accessor's index: the source's segments, then the destination's. */
function segmentNames(segments: number): string[] {
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
      ${firstOf(names.map((memory) => `(return (${alignable(instruction, memory)} (local.get $at)))`))}
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
      ${firstOf(names.map((memory) => `(${alignable(instruction, memory)} (local.get $at) (local.get $value)) (return)`))}
      ${choose(
        index,
        names.map((memory) => `(${alignable(instruction, memory)} (local.get $at) (local.get $value)) (return)`),
      )})`,
  );
  return [...loadFunctions, ...storeFunctions, copyFunction(segments, nameOf("copy"))].join("\n");
}

/** Most guests lie in their first segment: a test and a jump that is always predicted, before the table. */
function firstOf(cases: string[]): string {
  if (cases.length <= 2) return "";
  const destination = cases.length / 2;
  return `(if (i32.eqz (local.get $segment)) (then (if (local.get $end) (then ${cases[destination]}) (else ${cases[0]}))))`;
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

/** Runs the case that `index` selects, and goes on behind all of them. */
function select(index: string, cases: string[]): string {
  if (cases.length <= 2) return choose(index, cases);
  return `(block $selected (if (i32.eqz ${index}) (then ${cases[0]} (br $selected))) ${choose(
    index,
    cases.map((body) => `${body} (br $selected)`),
  )})`;
}

/**
 * copy(toSegment, to, fromSegment, from, length). 64 to 256 bytes, the most frequent, go in blocks of 64 without a loop, the last
 * one overlapping: such code is inlined where it is called. Memories are chosen once per block, which a branch predictor hides
 * better than a choice among all pairs.
 */
function copyFunction(segments: number, name: string): string {
  const all = segmentNames(segments);
  const sources = all.slice(0, segments);
  const destinations = all.slice(segments);

  /** Moves `bytes` from $from + at to $to + at in pieces of one width; all loads come before all stores. */
  const move = (type: "v128" | "i64" | "i32", bytes: number, at: string): string => {
    const width = { v128: 16, i64: 8, i32: 4 }[type];
    const steps = [...Array(bytes / width).keys()];
    const value = (step: number) => `$${type}.${step}`;
    const load = (memory: string) =>
      steps.map(
        (i) => `(local.set ${value(i)} (${type}.load $${memory} offset=${i * width} align=1 (local.get $source)))`,
      );
    const store = (memory: string) =>
      steps.map(
        (i) => `(${type}.store $${memory} offset=${i * width} align=1 (local.get $target) (local.get ${value(i)}))`,
      );
    return `
      (local.set $source (i64.add (local.get $from) ${at}))
      (local.set $target (i64.add (local.get $to) ${at}))
      ${select(
        "(local.get $fromSegment)",
        sources.map((memory) => load(memory).join("")),
      )}
      ${select(
        "(local.get $toSegment)",
        destinations.map((memory) => store(memory).join("")),
      )}`;
  };
  const start = "(i64.const 0)";
  /** Lengths from one to two times `bytes`: two moves, the second ending where the copy ends. */
  const twoMoves = (type: "v128" | "i64" | "i32", bytes: number) => `
    (if (i32.ge_u (local.get $length) (i32.const ${bytes})) (then
      ${move(type, bytes, start)}
      ${move(type, bytes, `(i64.sub (i64.extend_i32_u (local.get $length)) (i64.const ${bytes}))`)}
      (return)))`;
  const byte = (body: string) =>
    select(
      "(local.get $toSegment)",
      destinations.map((to) => `(i32.store8 $${to} (i64.add (local.get $to) (local.get $done)) ${body})`),
    );
  const bulk = destinations.flatMap((to) =>
    sources.map(
      (from) =>
        `(memory.copy $${to} $${from} (local.get $to) (local.get $from) (i64.extend_i32_u (local.get $length))) (return)`,
    ),
  );
  const pair =
    segments === 1
      ? "(i32.const 0)"
      : `(i32.add (i32.mul (local.get $toSegment) (i32.const ${segments})) (local.get $fromSegment))`;
  const parameters =
    "(param $toSegment i32) (param $to i64) (param $fromSegment i32) (param $from i64) (param $length i32)";
  const locals = `(local $source i64) (local $target i64)
    (local $v128.0 v128) (local $v128.1 v128) (local $v128.2 v128) (local $v128.3 v128)`;
  return `
  (func $guest.copy.other ${parameters} ${locals} (local $i64.0 i64) (local $i32.0 i32) (local $done i64)
    (if (i32.gt_u (local.get $length) (i32.const ${SMALL_COPY_BYTES})) (then ${choose(pair, bulk)}))
    ${twoMoves("v128", 32)}
    ${twoMoves("v128", 16)}
    ${twoMoves("i64", 8)}
    ${twoMoves("i32", 4)}
    (loop $bytes
      (if (i64.lt_u (local.get $done) (i64.extend_i32_u (local.get $length))) (then
        ${select(
          "(local.get $fromSegment)",
          sources.map(
            (from) => `(local.set $i32.0 (i32.load8_u $${from} (i64.add (local.get $from) (local.get $done))))`,
          ),
        )}
        ${byte("(local.get $i32.0)")}
        (local.set $done (i64.add (local.get $done) (i64.const 1)))
        (br $bytes)))))
  (func $${name} ${parameters} ${locals}
    (if (i32.gt_u (i32.sub (local.get $length) (i32.const 64)) (i32.const ${SMALL_COPY_BYTES - 64})) (then
      (call $guest.copy.other (local.get $toSegment) (local.get $to) (local.get $fromSegment) (local.get $from) (local.get $length))
      (return)))
    ${move("v128", 64, start)}
    (if (i32.eq (local.get $length) (i32.const 64)) (then (return)))
    (if (i32.gt_u (local.get $length) (i32.const 128)) (then
      ${move("v128", 64, "(i64.const 64)")}
      (if (i32.gt_u (local.get $length) (i32.const 192)) (then ${move("v128", 64, "(i64.const 128)")}))))
    ${move("v128", 64, "(i64.sub (i64.extend_i32_u (local.get $length)) (i64.const 64))")})`;
}
