// The calls from node-postgres: `node node_postgres.mjs USER_ID`, the database in the PG… variables.
import pg from "pg";

const client = new pg.Client();
await client.connect();

/** The one row that a call answers. A bigint and a numeric come as text: no digit is lost. */
async function ask(text, ...values) {
  const { rows } = await client.query(text, values);
  return rows[0];
}

try {
  const user = process.argv[2];
  const added = await ask(
    "select amount, new_balance from ducto.add_credits($1, $2, 'purchase', p_idempotency_key => $3)",
    user,
    1000,
    "invoice-1",
  );
  console.log(`added ${added.amount}, balance ${added.new_balance}`);

  const longest = { model: "gpt-5", input_tokens: 1200, output_tokens: 4096 };
  const hold = await ask(
    "select reservation_id, amount, error from ducto.reserve($1, $2, p_idempotency_key => $3)",
    user,
    longest,
    "request-1",
  );
  if (hold.error) throw new Error(hold.error);
  console.log(`held ${hold.amount}`);

  const used = { model: "gpt-5-2025-08-07", input_tokens: 1200, output_tokens: 350 };
  const charge = await ask(
    `select transaction_id, amount, cost, balance_after, error
     from ducto.deduct($1, $2, p_idempotency_key => $3, p_reservation_id => $4)`,
    user,
    used,
    "request-1",
    hold.reservation_id,
  );
  console.log(`charged ${-BigInt(charge.amount)} for ${charge.cost}, balance ${charge.balance_after}`);

  const refused = await ask(
    "select error from ducto.deduct_credits($1, $2, p_idempotency_key => $3)",
    user,
    1_000_000,
    "request-2",
  );
  console.log(`refused: ${refused.error}`);

  const balance = await ask("select balance, reserved from ducto.get_balance($1)", user);
  console.log(`balance ${balance.balance}, reserved ${balance.reserved}`);

  const refund = await ask(
    "select amount, new_balance from ducto.refund_credits($1, p_reason => $2, p_idempotency_key => $3)",
    charge.transaction_id,
    "answer was empty",
    "refund-1",
  );
  console.log(`refunded ${refund.amount}, balance ${refund.new_balance}`);
} finally {
  await client.end();
}
