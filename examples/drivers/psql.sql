-- The calls from psql: psql --set=ON_ERROR_STOP=1 --set=user_id=USER_ID --file=psql.sql, the database in the PG… variables.
select amount, new_balance
from ducto.add_credits(:'user_id', 1000, 'purchase', p_idempotency_key => 'invoice-1') \gset
\echo added :amount, balance :new_balance

select reservation_id, amount
from ducto.reserve(:'user_id', '{"model": "gpt-5", "input_tokens": 1200, "output_tokens": 4096}',
  p_idempotency_key => 'request-1') \gset
\echo held :amount

select transaction_id, -amount as charged, cost, balance_after
from ducto.deduct(:'user_id', '{"model": "gpt-5-2025-08-07", "input_tokens": 1200, "output_tokens": 350}',
  p_idempotency_key => 'request-1', p_reservation_id => :'reservation_id') \gset
\echo charged :charged for :cost, balance :balance_after

-- A refusal is an answer like any other: `error` is set, and nothing was written.
select error from ducto.deduct_credits(:'user_id', 1000000, p_idempotency_key => 'request-2') \gset
\echo refused: :error

select balance, reserved from ducto.get_balance(:'user_id') \gset
\echo balance :balance, reserved :reserved

select amount, new_balance
from ducto.refund_credits(:'transaction_id', p_reason => 'answer was empty', p_idempotency_key => 'refund-1') \gset
\echo refunded :amount, balance :new_balance
