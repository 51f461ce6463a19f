// Two artifacts.
import {bytes,el,meter,percent,table} from './elements.js';
import {D} from './ops.js';

export function comparison(){
  const c=D.comparison,digits=x=>x===null?'-':x.toPrecision(3),pairs=o=>Object.entries(o);
  const cell=(f,v)=>v===null?'-':typeof v==='string'?v:f.subject==='bytes'?bytes(v):v.toLocaleString('en');
  const part=(title,says,...rest)=>rest[1].length?[el('h2',{},title),says?el('p',{class:'soft'},says):'',table(...rest)]:[];
  return[...c.notes.map(n=>el('div',{class:'card'},n)),el('p',{},'B is described against A.',c.inputs?` Both ran on ${c.inputs}.`:''),
    ...part('Outputs','error: |B - A| / |A|. Moved rows have another argmax; in these A scores its choice at most the margin higher than B\'s. Gap: the median of what separates A\'s first from its second choice.',
      ['output','#error','#moved','#of rows','#margin','#gap','#KL, nats'],c.outputs,o=>[o.output,digits(o.error),o.moved,o.rows,digits(o.margin),digits(o.gap),digits(o.kl)]),
    ...part('Tokens with the same experts','',['layer','#share',''],pairs(c.routing),([n,s])=>[n,percent(s),meter(s)]),
    ...part('Time','Medians of turns, of the quotient with its quartiles.',['','#A, ms','#B, ms','#B / A','#from','#to'],pairs(c.times),([n,t])=>[n,digits(t.a),digits(t.b),digits(t.ratio),digits(t.low),digits(t.high)]),
    ...part('What they hold','',['','','A','B'],c.facts,f=>[f.subject,f.name,cell(f,f.a),f.a===f.b?cell(f,f.b):el('b',{},cell(f,f.b))]),
    ...part('Arrays of one format with other values','',['array','experts that differ'],pairs(c.altered),([n,e])=>[n,e.join(', ')||'-'])];
}
