/** Figures of several rounds, as the tables of the TAP bench show them. */

export function median(numbers: readonly number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
}

/** Median, lowest and highest. */
export function spread(numbers: readonly number[]): string {
  return `${digits(median(numbers))} (${digits(Math.min(...numbers))}..${digits(Math.max(...numbers))})`;
}

/** The median of the rounds' ratios. */
export function ratio(numbers: readonly number[], others: readonly number[]): number {
  return median(numbers.map((number, round) => number / others[round]!));
}

export function digits(number: number): string {
  return number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0);
}

/** Prints rows in columns, the first line being their titles. Cells of numbers to the right. */
export function printTable(rows: readonly (readonly string[])[]): void {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => (row[column] ?? "").length)));
  const isNumeric = (cell: string) => /^[\d.%<-]/.test(cell);
  for (const row of rows) {
    const cells = row.map((cell, column) => {
      const numeric = isNumeric(rows[1]?.[column] ?? "") && column > 0;
      return numeric ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!);
    });
    console.log(cells.join("  ").trimEnd());
  }
}
